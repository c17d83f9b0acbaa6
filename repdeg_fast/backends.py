"""Which backend serves which operation here, and why the others do not.

A backend is one set of kernels: ``reference`` (PyTorch, always there), ``cpu`` (C++), ``triton`` and ``cuda``
(CUDA C++). Each operation lists the backends it has; on a device the first that can serve is taken, in the order of
:data:`PREFERENCE`. ``REPDEG_FAST_BACKEND`` or :func:`use_backend` name one instead.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.native import build
from repdeg_fast.native.cache import cache_root

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

Limit = Callable[..., "str | None"]  # the tensors of a call -> why this backend cannot take them


@dataclass(frozen=True, eq=False)  # hashed by identity
class Operation:
    """One operation and its kernels, found by name: ``repdeg_fast.reference.<name>``,
    ``repdeg_fast.triton_kernels.<name>`` and the native operators ``<name>_<function>``.

    ``backends`` maps each backend beside the reference to what its kernels cannot take.
    """

    name: str
    functions: tuple[str, ...]
    backends: Mapping[str, Limit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _operations[self.name] = self

    def kernels(self, backend: str, *tensors: Tensor) -> Any:
        """The functions of the backend that serves this call; ``backend`` is a name or ``"auto"``."""
        return _implementation(self, self.choose(backend, *tensors))

    def choose(self, backend: str, *tensors: Tensor) -> str:
        device = tensors[0].device.type
        if backend != "auto":
            if reason := self.unavailable(backend, device, *tensors):
                raise RuntimeError(f"backend {backend!r} cannot serve {self.name} on {device}: {reason}")
            return backend
        reasons: list[str] = []
        for candidate in PREFERENCE.get(device, ("reference",)):
            reason = self.unavailable(candidate, device, *tensors) or _load_failure(candidate)
            if reason is None:
                if candidate == "reference" and reasons:
                    announce(f"repdeg_fast: {self.name} on {device} falls back to plain PyTorch: {'; '.join(reasons)}")
                return candidate
            reasons.append(f"{candidate}: {reason}")
        raise AssertionError("the reference always serves")

    def unavailable(self, backend: str, device: str, *tensors: Tensor) -> str | None:
        """Why ``backend`` cannot serve this operation on ``device`` (for these tensors, if given), or ``None``."""
        if backend == "reference":
            return None
        if backend not in self.backends:
            return f"{self.name} has no {backend} kernel"
        if reason := _environment(backend, device):
            return reason
        return self.backends[backend](*tensors) if tensors else None


_operations: dict[str, Operation] = {}


def _checked_name(source: str, backend: str) -> str:
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)} or auto, got {backend!r}")
    return backend


_requested = _checked_name("REPDEG_FAST_BACKEND", os.environ.get("REPDEG_FAST_BACKEND") or "auto")


def requested() -> str:
    """The backend asked for by :func:`use_backend` or ``REPDEG_FAST_BACKEND``, else ``"auto"``."""
    return _requested


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation from one backend (``"auto"``: the usual choice) inside a ``with`` block.

    A backward pass uses the backend of its forward pass, wherever it runs. The setting holds for the whole process.

    Raises:
        ValueError: for an unknown name. A backend that cannot serve raises ``RuntimeError`` at the call.
    """
    global _requested
    before, _requested = _requested, _checked_name("name", name)
    try:
        yield
    finally:
        _requested = before


def status() -> dict[str, dict[str, dict[str, str | None]]]:
    """For each operation and device type: what serves, and for every backend ``None`` or why it does not. A backend
    that was asked for stands under ``"serves"`` even if it cannot.

    ``status()["cosreg"]["cpu"]`` is ``{"serves": "cpu", "reference": None, "cpu": None, "triton": "...", ...}``.
    Compiles nothing.
    """
    table: dict[str, dict[str, dict[str, str | None]]] = {}
    for name, operation in sorted(_operations.items()):
        table[name] = {}
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = {backend: operation.unavailable(backend, device) for backend in BACKENDS}
            serves = requested()
            if serves == "auto":
                serves = next(backend for backend in PREFERENCE[device] if reasons[backend] is None)
            table[name][device] = {"serves": serves, **reasons}
    return table


def _environment(backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run on ``device`` in this process, whatever the operation."""
    if backend == "triton":
        return _triton_unavailable(device)
    if backend != device:
        return f"serves {backend} tensors only"
    return build.unavailable(backend)


def _triton_unavailable(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux)"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CPU tensors only in the interpreter; set TRITON_INTERPRET=1 before importing repdeg_fast"
    if device not in ("cpu", "cuda"):
        return f"has no support for {device} tensors"
    if device == "cuda" and not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "no C compiler for its launchers; install gcc or clang (CC names another)"
    return None


def _load_failure(backend: str) -> str | None:
    """Compile and load a native backend if that has not been done; why it failed, or ``None``."""
    if backend in build.LIBRARIES:
        try:
            build.load(backend)
        except RuntimeError as error:
            return str(error)
    return None


@functools.cache
def _implementation(operation: Operation, backend: str) -> Any:
    if backend == "reference":
        return importlib.import_module(f"repdeg_fast.reference.{operation.name}")
    if backend == "triton":
        _load_tuning()
        return importlib.import_module(f"repdeg_fast.triton_kernels.{operation.name}")
    build.load(backend)
    return build.operators(operation.name, *operation.functions)


def tuning_file() -> Path:
    """Where ``repdeg-fast tune`` keeps the launch configurations that it found."""
    return cache_root() / "tuning.json"


@functools.cache
def _load_tuning() -> None:
    importlib.import_module("repdeg_fast.triton_kernels.tuning").load(tuning_file())


@functools.cache
def announce(message: str) -> None:
    """Once a process for each message (the cache is what remembers)."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)
