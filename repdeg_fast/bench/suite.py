"""What a benchmark suite is made of. One operation is one file in ``bench/suites/`` that defines ``SUITE``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repdeg_fast._checks import InputError
from repdeg_fast.backends import BACKENDS, Operation, use_backend

FORWARD, FORWARD_BACKWARD = PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-10}

Inputs = dict[str, Tensor]  # those with requires_grad are the leaves that get gradients


@dataclass(frozen=True, eq=False)
class Work:
    """Bytes that must move and operations that must be done, whoever does them."""

    bytes: int
    flops: int


@dataclass(frozen=True, eq=False)
class Case:
    """One size of the problem, with synthetic or real (``load``) weights."""

    name: str
    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    default_on: tuple[str, ...] = ("cpu", "cuda")
    brief: bool = False  # on a CPU the one of its operation that runs unless asked for more
    group: str | None = None  # the cases of one group are plotted against their size
    tokens: int | None = None  # for tokens/s, where an operation has tokens
    load: Callable[[], Tensor] | None = None
    unavailable: str | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {size:,}" for name, size in self.sizes.items())
        return f"{self.name}: {sizes}, {dtype_name(self.dtype)}"


@dataclass(frozen=True, eq=False)
class Provider:
    """One way to compute the operation.

    ``prepare(inputs)`` returns a function that runs the forward pass and returns a tensor to differentiate; for a
    ``graph_free`` provider it does both passes in one call and adds to the ``.grad`` that is there. ``needs`` is the
    memory and arithmetic of a wasteful provider, so that it can be left out where it would not fit. A ``floor`` is no
    implementation but a part of the work that nobody can do without, timed alone; its text says which. One that draws
    its ``own_noise`` has a value like others, but none that could be held to the exact one.
    """

    name: str
    prepare: Callable[[Inputs], Callable[[], Tensor]]
    passes: tuple[str, ...] = PASSES
    graph_free: bool = False
    ours: bool = False
    unavailable: Callable[[Inputs], str | None] = lambda inputs: None
    needs: Callable[[Case], Work] | None = None
    in_sweeps: bool = True  # False: grows too fast to be part of one
    in_brief: bool = True  # False: slow to compile, and another has been faster in every case
    floor: str = ""
    own_noise: bool = False
    peer: str = ""  # the package that it is, where that is neither ours nor PyTorch

    @property
    def unchecked(self) -> str:
        """Why its value is not held to the exact one; empty where it is."""
        return self.floor or ("not compared: draws its own noise" if self.own_noise else "")

    @property
    def rival(self) -> bool:
        return not self.ours and not self.floor


def relative_error(output: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """‖output − exact‖ / ‖exact‖, in double: PyTorch's fp32 norm of a large tensor is itself off by more than the
    tolerance. Relative to ``least`` where an exact value is all but cancelled."""
    difference = float(torch.linalg.vector_norm(output.double() - exact))
    size = max(float(torch.linalg.vector_norm(exact)), least, 1e-300)
    return 0.0 if difference == 0 else difference / size


@dataclass(frozen=True, eq=False)
class Suite:
    """The benchmark of one operation."""

    op: str
    cases: Sequence[Case]
    providers: Sequence[Provider]  # one of them is named "eager": speedups are against it
    make_inputs: Callable[[Case, torch.device], Inputs]
    work: Callable[[Case, str, bool], Work]  # (case, pass, graph_free)
    exact: Callable[[Inputs], Tensor]  # in float64; what providers are checked against
    size: Callable[[Case], int]  # what cost should grow with: the horizontal axis of a sweep
    size_label: str
    value_name: str
    case_of_weights: Callable[[str, Tensor], Case]  # for --weights
    error: Callable[[Inputs, Tensor, Tensor], float] = lambda inputs, *outputs: relative_error(*outputs)  # exact: last


@functools.cache
def suites() -> dict[str, Suite]:
    """Every operation that has a file in ``bench/suites/``."""
    package = importlib.import_module("repdeg_fast.bench.suites")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    found = [importlib.import_module(f"{package.__name__}.{name}").SUITE for name in names]
    return {suite.op: suite for suite in found}


@dataclass(frozen=True, eq=False)
class Selection:
    """What to run of one suite."""

    suite: Suite
    cases: list[Case]
    providers: list[Provider]


def select(
    ops: Sequence[str],
    cases: Sequence[str],
    providers: Sequence[str],
    device: torch.device,
    one_more: bool = False,
    full: bool = True,
) -> list[Selection]:
    """What the names stand for; no names: every operation, the cases that are default on ``device`` (on a CPU the brief
    ones alone unless ``full``, where an operation has one), every provider.
    ``one_more``: there will be a case of the caller's, for operations that are named and have none here, too.

    Raises:
        InputError: a name that no chosen operation knows (lists what there is), or a case that cannot run here.
    """
    _check_known("ops", ops, suites())
    chosen = [suites()[op] for op in ops or suites()]
    _check_known("cases", cases, [name for suite in chosen for case in suite.cases for name in (case.name, case.group)])
    _check_known("providers", providers, [provider.name for suite in chosen for provider in suite.providers])
    brief = device.type == "cpu" and not full
    selections = [
        Selection(
            suite,
            _choose_cases(suite, cases, device, brief, named=bool(ops)),
            _choose_providers(suite, providers, brief and not cases),
        )
        for suite in chosen
    ]
    selections = [s for s in selections if s.providers and (s.cases or (one_more and ops))]
    if not selections:
        raise InputError("no chosen operation has both one of the cases and one of the providers")
    return selections


def _choose_providers(suite: Suite, names: Sequence[str], brief: bool) -> list[Provider]:
    if not names:
        return [provider for provider in suite.providers if provider.in_brief or not brief]
    return [provider for provider in suite.providers if provider.name in names]


def _choose_cases(suite: Suite, names: Sequence[str], device: torch.device, brief: bool, named: bool) -> list[Case]:
    if not names:
        listed = [case for case in suite.cases if device.type in case.default_on and not case.unavailable]
        if not brief:
            return listed
        return [case for case in suite.cases if case.brief] or (listed if named else [])
    chosen = [case for case in suite.cases if {case.name, case.group} & set(names)]
    for case in chosen:
        if case.unavailable:
            raise InputError(f"cases: {case.name} cannot run here: {case.unavailable}")
    return chosen


def _check_known(what: str, names: Sequence[str], known: Iterable[str | None]) -> None:
    there = list(dict.fromkeys(name for name in known if name))
    if unknown := [name for name in names if name not in there]:
        raise InputError(f"{what}: got {', '.join(map(repr, unknown))}; there are {', '.join(there)}")


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A ``torch.compile`` of its own for these sizes: one shared between cases would turn to dynamic shapes."""
    return torch.compile(function, dynamic=False)


def per_backend(
    operation: Operation,
    call: Callable[[Inputs], Tensor],
    tensors: Callable[[Inputs], Sequence[Tensor]],
    reference_needs: Callable[[Case], Work] | None = None,
    name: str = "ours",
    named: Sequence[str] = BACKENDS,
    passes: tuple[str, ...] = PASSES,
) -> list[Provider]:
    """Our operation on each of the ``named`` backends; ``tensors`` are those that its backend limits look at."""

    def provider(backend: str) -> Provider:
        def prepare(inputs: Inputs) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with use_backend(backend):
                    return call(inputs)

            return run

        def unavailable(inputs: Inputs) -> str | None:
            shown = tensors(inputs)
            return operation.unavailable(backend, shown[0].device.type, *shown)

        needs = reference_needs if backend == "reference" else None
        return Provider(f"{name}-{backend}", prepare, passes, ours=True, unavailable=unavailable, needs=needs)

    return [provider(backend) for backend in named]


def leaves(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
