"""Run cases × providers × passes: check, count memory, time, and collect one :class:`Row` each.

On a CPU all providers of a case take turns. On a GPU they come one after the other, ours first: one that breaks the
process's GPU (an illegal address makes every later call fail) costs those that follow it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.bench import gpu_timing, measure, memory
from repdeg_fast.bench.suite import PASSES, TOLERANCE, Case, Inputs, Provider, Suite, dtype_name

Tick = Callable[..., None]


@dataclass
class Row:
    """One provider, case and pass; without figures and with a ``reason`` where it could not be measured."""

    suite: Suite
    case: Case
    provider: Provider
    pass_: str
    device: str
    versions: dict[str, Any]
    bytes: int
    flops: int
    samples: list[float] = field(default_factory=list)
    timing: str | None = None  # how they were taken, on a GPU
    host_us: float | None = None  # of a call, likewise
    percent_of_roof: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    speedup_vs_eager: float | None = None
    speedup_vs_rival: float | None = None
    times_floor: float | None = None
    value: float | None = None
    error: float | None = None  # relative to the float64 value
    exact: float | None = None
    reason: str | None = None
    failed: bool = False  # raised, as opposed to cannot serve here

    @property
    def wrong(self) -> bool:
        """Farther from the float64 value than the dtype allows; NaN is wrong too."""
        return self.error is not None and not self.error <= TOLERANCE[self.case.dtype]

    @property
    def ms(self) -> float | None:
        return self.percentile(0.5)

    def percentile(self, share: float) -> float | None:
        return measure.percentile(self.samples, share) if self.samples else None

    def as_json(self) -> dict[str, Any]:
        return {
            "op": self.suite.op,
            "case": self.case.name,
            "provider": self.provider.name,
            "pass": self.pass_,
            "device": self.device,
            "dtype": dtype_name(self.case.dtype),
            "ms_median": self.ms,
            "ms_p20": self.percentile(0.2),
            "ms_p80": self.percentile(0.8),
            "timing": self.timing,
            "host_us": self.host_us,
            "bytes": self.bytes,
            "flops": self.flops,
            "percent_of_roof": self.percent_of_roof,
            "peak_bytes": self.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "speedup_vs_eager": self.speedup_vs_eager,
            "times_floor": self.times_floor,
            "floor": bool(self.provider.floor),
            "versions": self.versions,
            "value": None if self.value is None or math.isnan(self.value) else self.value,  # JSON has no NaN
            "reason": f"wrong value {self.value!r}: float64 gives {self.exact!r}" if self.wrong else self.reason,
        }


def count_ticks(cases: Sequence[Case], providers: Sequence[Provider]) -> int:
    """How many steps :func:`run` reports by ``tick``: one when a provider is ready, and one for each pass it has."""
    return len(cases) * sum(1 + len(provider.passes) for provider in providers)


def run(
    suite: Suite,
    cases: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    tick: Tick = lambda text, steps=1: None,
) -> Iterator[list[Row]]:
    """The rows of each case in turn, as soon as it is done."""
    for case in cases:
        yield _run_case(suite, case, providers, device, seconds, tick)


def _run_case(
    suite: Suite, case: Case, providers: Sequence[Provider], device: torch.device, seconds: float, tick: Tick
) -> list[Row]:
    torch._dynamo.reset()  # each case compiles afresh, for its own sizes
    versions = measure.versions(device)
    rows = {provider: _rows(suite, case, provider, device, versions) for provider in providers}
    try:
        tick("measuring the roof", steps=0)
        roof = measure.roof(device, case.dtype)
        tick(f"{case.name}: inputs, and the value in float64", steps=0)
        inputs = suite.make_inputs(case, device)
        exact = suite.exact(inputs)
    except RuntimeError as failure:  # too little memory; or a GPU that an earlier case has broken
        for row in itertools.chain(*rows.values()):
            row.reason, row.failed = measure.describe(failure), True
        return list(itertools.chain(*rows.values()))
    measured = _one_by_one if device.type == "cuda" else _taking_turns
    measured(rows, inputs, exact, device, seconds, tick)
    for row in itertools.chain(*rows.values()):
        if row.samples:
            row.percent_of_roof = roof.percent(measure.Work(row.bytes, row.flops), row.ms or 0)
    found = list(itertools.chain(*rows.values()))
    for pass_ in PASSES:
        _compare([row for row in found if row.pass_ == pass_ and row.samples], device)
    return found


def _rows(suite: Suite, case: Case, provider: Provider, device: torch.device, versions: dict[str, Any]) -> list[Row]:
    works = {pass_: suite.work(case, pass_, provider.graph_free) for pass_ in provider.passes}
    return [
        Row(suite, case, provider, pass_, device.type, versions, work.bytes, work.flops)
        for pass_, work in works.items()
    ]


def _prepare(
    rows: Sequence[Row], inputs: Inputs, exact: Tensor, device: torch.device, tick: Tick
) -> measure.Step | None:
    """The step of one provider, checked; what is known of it then stands in its rows."""
    suite, case, provider = rows[0].suite, rows[0].case, rows[0].provider
    step, facts = prepare(suite, case, provider, inputs, exact, device)
    for row in rows:
        for name, fact in facts.items():
            setattr(row, name, fact)
        if step is None:
            tick(f"{case.name} {provider.name}: left out")
    tick(f"{case.name} {provider.name}: ready")
    return step


def _taking_turns(
    rows: dict[Provider, list[Row]], inputs: Inputs, exact: Tensor, device: torch.device, seconds: float, tick: Tick
) -> None:
    """All providers are prepared; then, pass by pass, their repeats are interleaved."""
    steps = []
    for of_provider in rows.values():
        if step := _prepare(of_provider, inputs, exact, device, tick):
            steps += [(row, step.of_pass(row.pass_)) for row in of_provider]
    for row, step in steps:
        row.peak_bytes = None if row.provider.floor else memory.peak_bytes(step, device)
    for pass_ in PASSES:
        of_pass = [(row, step) for row, step in steps if row.pass_ == pass_]

        def done(i: int, of_pass: list = of_pass) -> None:
            tick(f"{of_pass[i][0].case.name} {of_pass[i][0].provider.name}: {of_pass[i][0].pass_}")

        samples = measure.time_steps([step for _, step in of_pass], seconds, done)
        for (row, _), taken in zip(of_pass, samples, strict=True):
            row.samples = taken


def _one_by_one(
    rows: dict[Provider, list[Row]], inputs: Inputs, exact: Tensor, device: torch.device, seconds: float, tick: Tick
) -> None:
    """Ours first, then PyTorch's forms, then other packages. After one that breaks the GPU, the rest say so."""
    gpu, lost = gpu_timing.gpu(device), None
    sets: list[Inputs] = []
    for provider in sorted(rows, key=lambda provider: (not provider.ours, bool(provider.peer))):
        if lost:
            for row in rows[provider]:
                row.reason, row.failed = lost, True
            continue
        try:
            if step := _prepare(rows[provider], inputs, exact, device, tick):
                suite, case = rows[provider][0].suite, rows[provider][0].case
                sets = sets or measure.rotation(suite, case, inputs, device)
                _time_on_gpu(rows[provider], [step, *measure.steps(provider, sets[1:])], gpu, seconds, tick)
        except RuntimeError as failure:
            for row in rows[provider]:
                row.samples, row.reason, row.failed = [], measure.describe(failure), True
        if failure_of_all := measure.lost(device):
            lost = f"not run: {provider.name} broke this process's GPU ({failure_of_all})"


def _time_on_gpu(
    rows: Sequence[Row], steps: Sequence[measure.Step], gpu: gpu_timing.Gpu, seconds: float, tick: Tick
) -> None:
    for step in steps[1:]:  # compiles nothing new, but a first call may look at things
        step.reset()
        step.run()
    for row in rows:
        of_pass = [step.of_pass(row.pass_) for step in steps]
        row.peak_bytes = None if row.provider.floor else memory.peak_bytes(of_pass[0], gpu.device)
        timing = gpu_timing.time_in_turn(of_pass, gpu, seconds)
        row.samples, row.timing, row.host_us = timing.samples, timing.method, timing.host_us
        tick(f"{row.case.name} {row.provider.name}: {row.pass_}")
    for step in steps:
        measure.clear_gradients(step.leaves)


def prepare(
    suite: Suite, case: Case, provider: Provider, inputs: Inputs, exact: Tensor, device: torch.device
) -> tuple[measure.Step | None, dict[str, Any]]:
    """The provider's step, run once and checked where that can be, with what is common to its rows; no step and the
    reason where it cannot run. A floor has no memory of interest."""
    exact_value = float(exact.double().mean())
    if reason := measure.unfit(provider, case, inputs, device):
        return None, {"reason": reason, "exact": exact_value}
    try:
        call = provider.prepare(inputs)
        step = measure.Step(provider, call, inputs, provider.passes[-1])
        step.reset()
        output = step.run().detach()  # the first call compiles, both passes
        step.reset()
        if provider.floor:
            return step, {"exact": exact_value}
        facts = {"saved_bytes": 0 if provider.graph_free else memory.saved_bytes(call, inputs), "exact": exact_value}
    except Exception as failure:  # a peer that does not work here is a row like others, not the end of the run
        return None, {"reason": measure.describe(failure), "failed": True, "exact": exact_value}
    if not provider.unchecked:
        facts |= {"value": float(output.double().mean()), "error": suite.error(inputs, output, exact)}
    return step, facts


def _compare(rows: list[Row], device: torch.device) -> None:
    """Speedups within one pass: against eager, and against the best provider that is not ours; and the time as a
    multiple of the floor's."""
    eager = next((row for row in rows if row.provider.name == "eager"), None)
    floor = next((row for row in rows if row.provider.floor), None)
    rivals = [row for row in rows if row.provider.rival]
    best = min(rivals, key=lambda row: row.ms or 0, default=None)
    for row in rows:
        row.speedup_vs_eager = measure.speedup(eager.samples, row.samples, device) if eager else None
        row.speedup_vs_rival = measure.speedup(best.samples, row.samples, device) if best else None
        row.times_floor = measure.speedup(row.samples, floor.samples, device) if floor else None
