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
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from repdeg_fast._checks import InputError
from repdeg_fast.native import Namespace, build
from repdeg_fast.native.cache import cache_root

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

K = TypeVar("K")  # an operation's Kernels protocol: repdeg_fast/contracts/<operation>.py
Limit = Callable[..., "str | None"]  # the tensors of a call -> why a backend's kernels cannot take them


class Operation(Generic[K]):
    """One operation and its kernels.

    Args:
        name: the operation's, in every layer.
        reference: its kernels in PyTorch.
        native: makes those of ``cpu`` and ``cuda`` from a namespace of ``torch.ops``; both have the same schemas.
        triton: imports those in Triton, where ``limits`` has it.
        limits: the backends that it has beside the reference, and what their kernels cannot take.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: K,
        native: Callable[[Namespace], K],
        limits: Mapping[str, Limit],
        triton: Callable[[], K] | None = None,
    ) -> None:
        self.name, self.reference, self.native = name, reference, native
        self.triton = triton or _no_triton
        self.limits: Mapping[str, Limit] = {"reference": no_limit, **limits}
        self._found: dict[tuple[str, str], K | _Unavailable] = {}
        self._unlimited: dict[tuple[str, torch.device], K] = {}  # those that serve every call there
        _operations[name] = self

    def kernels(self, backend: str, *tensors: Tensor) -> K:
        """Those that serve this call; ``backend`` is a name or ``"auto"``."""
        kernels = self._unlimited.get((backend, tensors[0].device))
        return self._serving(backend, tensors) if kernels is None else kernels

    def _serving(self, backend: str, tensors: tuple[Tensor, ...]) -> K:
        device = tensors[0].device.type
        order = PREFERENCE.get(device, ("reference",)) if backend == "auto" else (backend,)
        for name in order:
            found, limit = self._find(name, device), self.limits.get(_backends[name].kernels_of, no_limit)
            if not isinstance(found, _Unavailable) and limit(*tensors) is None:
                if name != backend and (name == "reference" or strict()):
                    self._announce_fallback(name, device, *tensors)
                elif limit is no_limit and name == order[0]:  # whatever the tensors are
                    self._unlimited[backend, tensors[0].device] = found
                return found
        reason = self.unavailable(backend, device, *tensors)
        raise RuntimeError(f"backend {backend!r} cannot serve {self.name} on {device}: {reason}")

    def unavailable(self, backend: str, device: str, *tensors: Tensor) -> str | None:
        """Why ``backend`` cannot serve this operation on ``device`` (for these tensors, if given), or ``None``.
        Compiles nothing."""
        one = _backends[_checked_name("REPDEG_FAST_BACKEND", backend)]  # use_backend has checked its own
        if one.kernels_of not in self.limits:
            return f"{self.name} has no {one.kernels_of} kernel"
        found = self._found.get((backend, device))
        if reason := found if isinstance(found, _Unavailable) else one.unavailable(device):
            return reason
        return self.limits[one.kernels_of](*tensors) if tensors else None

    def _find(self, backend: str, device: str) -> K | _Unavailable:
        """Looked up once: a call asks the system nothing."""
        key = backend, device
        if key not in self._found:
            reason = self.unavailable(backend, device)
            try:
                self._found[key] = _Unavailable(reason) if reason else _backends[backend].kernels(self)
            except RuntimeError as error:  # it did not compile
                self._found[key] = _Unavailable(str(error))
        return self._found[key]

    def _announce_fallback(self, serving: str, device: str, *tensors: Tensor) -> None:
        """Where backends come before the one that serves. An operation that has kernels in none of them falls back from
        nothing: that is said, but no error in strict mode."""
        order = PREFERENCE.get(device, ("reference",))
        before = [name for name in order[: order.index(serving)] if serving == "reference" or name in self.limits]
        reasons = [f"{name}: {self.unavailable(name, device, *tensors)}" for name in before]
        if reasons:
            what = "plain PyTorch" if serving == "reference" else serving
            say = announce if self.limits.keys() & {*before} else _warn_once
            say(f"repdeg_fast: {self.name} on {device} falls back to {what}: {'; '.join(reasons)}")


def _no_triton() -> NoReturn:
    raise RuntimeError("there are no Triton kernels of this operation")


class _Unavailable(str):
    """Why there are no kernels."""


def no_limit(*_: Tensor) -> None:
    """For kernels that take whatever their operator lets through."""


def no_float64(*tensors: Tensor) -> str | None:
    """For kernels on GPUs, whose arithmetic is fp32."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64 is for the reference and cpu backends"
    return None


def aligned_rows(*matrices: Tensor) -> str | None:
    """For kernels that move rows of fp32 or 16-bit values 16 bytes at a time."""
    for matrix in matrices:
        row_bytes = [size * matrix.element_size() for size in (matrix.shape[1], matrix.stride(0))]
        if matrix.stride(1) != 1 or matrix.data_ptr() % 16 or any(size % 16 for size in row_bytes):
            return "needs contiguous rows of a multiple of 16 bytes that start on 16-byte boundaries"
    return no_float64(*matrices)


class Backend(ABC):
    """A set of kernels. ``kernels_of``: whose limits they have, where that is not its own name (an emulation)."""

    def __init__(self, name: str, kernels_of: str = "") -> None:
        self.name, self.kernels_of = name, kernels_of or name

    @abstractmethod
    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on ``device`` in this process, whatever the operation, with the remedy; else ``None``."""

    @abstractmethod
    def kernels(self, operation: Operation[K]) -> K:
        """Its kernels of ``operation``, which must have some; ``RuntimeError`` if they do not compile."""


class Reference(Backend):
    def unavailable(self, device: str) -> str | None:
        return None

    def kernels(self, operation: Operation[K]) -> K:
        return operation.reference


class Native(Backend):
    """``cpu`` and ``cuda``: each serves the device of its name."""

    def unavailable(self, device: str) -> str | None:
        return build.unavailable(self.name) if device == self.name else f"serves {self.name} tensors only"

    def kernels(self, operation: Operation[K]) -> K:
        build.load(self.name)
        return operation.native(torch.ops.repdeg_fast_native)


class Triton(Backend):
    def unavailable(self, device: str) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton (Linux)"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on CPU tensors only in the interpreter; set TRITON_INTERPRET=1 before importing repdeg_fast"
        if device not in ("cpu", "cuda"):
            return f"has no support for {device} tensors"
        if device == "cuda" and not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
            return "no C compiler for its launchers; install gcc or clang (CC names another)"
        return None

    def kernels(self, operation: Operation[K]) -> K:
        _load_tuning()
        return operation.triton()


_operations: dict[str, Operation[Any]] = {}
_backends: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Let ``backend`` be asked for by its name, instead of one that had it."""
    _backends[backend.name] = backend
    forget()


def forget() -> None:
    """Look anew which kernels there are, at the next call of each operation."""
    for operation in _operations.values():
        operation._found.clear()
        operation._unlimited.clear()


for _backend in (Reference("reference"), Native("cpu"), Triton("triton"), Native("cuda")):
    register(_backend)


def _checked_name(source: str, backend: str) -> str:
    if backend not in (*_backends, "auto"):
        raise InputError(f"{source}: expected one of {', '.join(_backends)} or auto, got {backend!r}")
    return backend


_default = os.environ.get("REPDEG_FAST_BACKEND") or "auto"  # checked in use: an import ends in no error
_requested = ContextVar("repdeg_fast_backend", default=_default)


class _Traced(threading.local):
    """What :data:`_requested` says, for torch.compile: it cannot trace a context variable, but guards this."""

    name = _default


_traced = _Traced()


def requested() -> str:
    """The backend asked for by :func:`use_backend` or ``REPDEG_FAST_BACKEND``, else ``"auto"``."""
    return _traced.name if torch.compiler.is_compiling() else _requested.get()


def check_requested() -> None:
    """Raises ``ValueError`` where ``REPDEG_FAST_BACKEND`` names no backend, before a call would."""
    _checked_name("REPDEG_FAST_BACKEND", requested())


def use_backend(name: str) -> AbstractContextManager[None]:
    """Serve every operation from one backend (``"auto"``: the usual choice) inside a ``with`` block.

    The setting is that of a context variable: of this thread or task alone. A backward pass uses the backend of its
    forward pass, wherever it runs.

    Raises:
        ValueError: for an unknown name, also without ``with``. A backend that cannot serve raises ``RuntimeError`` at
            the call.
    """
    return _using(_checked_name("name", name))


@contextmanager
def _using(name: str) -> Iterator[None]:
    token, before = _requested.set(name), _traced.name
    _traced.name = name
    try:
        yield
    finally:
        _requested.reset(token)
        _traced.name = before


def status() -> dict[str, dict[str, dict[str, str | None]]]:
    """For each operation and device type: what serves, and for every backend ``None`` or why it does not. A backend
    that was asked for stands under ``"serves"`` even if it cannot.

    ``status()["cosreg"]["cpu"]`` is ``{"serves": "cpu", "reference": None, "cpu": None, "triton": "...", ...}``.
    Compiles nothing.
    """
    check_requested()
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


def tuning_file() -> Path:
    """Where ``repdeg-fast tune`` keeps the launch configurations that it found."""
    return cache_root() / "tuning.json"


@functools.cache
def _load_tuning() -> None:
    from repdeg_fast.triton_kernels import tuning

    with warnings.catch_warnings():
        if strict():
            warnings.simplefilter("error", RuntimeWarning)
        try:
            tuning.load(tuning_file())
        except RuntimeWarning as unreadable:
            forbid_if_strict(str(unreadable))


def strict() -> bool:
    """Whether ``REPDEG_FAST_STRICT=1`` makes every fallback an error. Asked where there is one, not at each call."""
    return os.environ.get("REPDEG_FAST_STRICT", "0") not in ("", "0")


def forbid_if_strict(message: str) -> None:
    """Where something falls back: ``RuntimeError`` in strict mode."""
    if strict():
        raise RuntimeError(f"{message} (REPDEG_FAST_STRICT=1 makes this an error; unset it to go on regardless)")


def announce(message: str) -> None:
    """A fallback: an error in strict mode, else a warning."""
    forbid_if_strict(message)
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    """Once a process for each message (the cache is what remembers), at the line that called this package."""
    warnings.warn(message, RuntimeWarning, stacklevel=_frames_within() + 1)


def _frames_within() -> int:
    """How many frames, from that of the caller on, are of this package or of torch."""
    inside = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (sys.modules[__package__], torch))
    frame: FrameType | None = sys._getframe(1)
    number = 0
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, number = frame.f_back, number + 1
    return number
