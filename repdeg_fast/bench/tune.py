"""``repdeg-fast tune``: on this GPU, try the configurations that each Triton launcher lists, and remember the fastest.

A case is run once to learn which kernels it launches and what each could choose from; then each kernel in turn is run
with each of its configurations. One that fails, or gives other values than the one that ships, is out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.bench import gpu_timing, measure
from repdeg_fast.bench.suite import TOLERANCE, Case, Provider, Selection, relative_error

Timer = Callable[[Sequence[measure.Step]], float]  # milliseconds of a step; given several, on inputs of their own
_DIFFERENCE = 3  # tolerances: each may be off by one; and of some thousand tokens, two may go the other way
_GAIN = 0.02  # a smaller one may be noise


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel, and what became of it: its time, or why it is out."""

    question: str  # kernel, dtype and sizes, as the launcher asked
    configuration: Any
    ms: float | None
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"question": self.question, **asdict(self.configuration), "ms": self.ms, "reason": self.reason}


def tune(
    selections: Sequence[Selection],
    device: torch.device,
    timer: Timer,
    file: Path,
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Trial]]:
    """The trials of each kernel and size in turn, the one that ships first; the best are in ``file`` by then."""
    from repdeg_fast.triton_kernels import tuning

    settled: dict[str, Any] = {}
    for selection in selections:
        for case in selection.cases:
            for provider in filter(_launches_triton, selection.providers):
                inputs = selection.suite.make_inputs(case, device)
                if measure.unfit(provider, case, inputs, device):
                    continue
                steps = measure.steps(provider, measure.rotation(selection.suite, case, inputs, device))
                for question, configurations in _questions(steps[0], settled).items():
                    tick(f"{case.name} {provider.name}: {question}")
                    trials = list(_trials(case, steps, question, configurations, settled, timer))
                    settled[question] = fastest(trials)
                    if settled[question] != configurations[0]:
                        tuning.remember(file, tuning.device_name(device), question, settled[question])
                    yield trials
                for step in steps:
                    measure.clear_gradients(step.leaves)


def _launches_triton(provider: Provider) -> bool:
    return provider.ours and provider.name.endswith("-triton")


def _questions(step: measure.Step, settled: dict[str, Any]) -> dict[str, Sequence[Any]]:
    """What the launchers of a step ask that is not settled, and what they could choose from."""
    from repdeg_fast.triton_kernels import tuning

    asked: dict[str, Sequence[Any]] = {}

    def note(question: str, configurations: Sequence[Any]) -> Any:
        asked[question] = list(dict.fromkeys(configurations))
        return configurations[0]

    with tuning.answering(note):
        _results(step)
    return {question: found for question, found in asked.items() if question not in settled and len(found) > 1}


def _trials(
    case: Case,
    steps: Sequence[measure.Step],
    question: str,
    configurations: Sequence[Any],
    settled: dict[str, Any],
    timer: Timer,
) -> Iterator[Trial]:
    from repdeg_fast.triton_kernels import tuning

    expected: list[Tensor] = []
    for configuration in configurations:
        answers = {**settled, question: configuration}
        with tuning.answering(lambda asked, listed, answers=answers: answers.get(asked, listed[0])):
            try:
                found = _results(steps[0])
                expected = expected or found
                errors = [relative_error(a, b.double()) for a, b in zip(found, expected, strict=True)]
                if not all(error <= _DIFFERENCE * TOLERANCE[case.dtype] for error in errors):
                    yield Trial(question, configuration, None, "other values than the one that ships")
                    continue
                yield Trial(question, configuration, timer(steps))
            except Exception as failure:  # too large for this chip, for example
                yield Trial(question, configuration, None, measure.describe(failure))


def _results(step: measure.Step) -> list[Tensor]:
    """The output and the gradients, for the same noise each time."""
    step.reset()
    torch.manual_seed(0)
    output = step.run().detach()
    return [output, *(leaf.grad.clone() for leaf in step.leaves if leaf.grad is not None)]


def fastest(trials: Sequence[Trial]) -> Any:
    """The configuration that ships unless another one is clearly faster."""
    shipped = trials[0]
    best = min((trial for trial in trials if trial.ms is not None), key=lambda trial: trial.ms or 0, default=shipped)
    if shipped.ms is not None and best.ms is not None and best.ms > (1 - _GAIN) * shipped.ms:
        return shipped.configuration
    return best.configuration


def median_timer(device: torch.device, seconds: float) -> Timer:
    if device.type == "cuda":
        return lambda steps: statistics.median(gpu_timing.time_in_turn(steps, gpu_timing.gpu(device), seconds).samples)
    return lambda steps: statistics.median(measure.time_steps(steps[:1], seconds)[0])
