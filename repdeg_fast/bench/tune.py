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

from repdeg_fast.bench import measure
from repdeg_fast.bench.suite import TOLERANCE, Case, Provider, Selection

Timer = Callable[[measure.Step], float]  # milliseconds
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
                step = measure.Step(provider, provider.prepare(inputs), inputs, provider.passes[-1])
                for question, configurations in _questions(step, settled).items():
                    tick(f"{case.name} {provider.name}: {question}")
                    trials = list(_trials(step, case, question, configurations, settled, timer))
                    settled[question] = fastest(trials)
                    if settled[question] != configurations[0]:
                        tuning.remember(file, tuning.device_name(device), question, settled[question])
                    yield trials
                step.reset()


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
    step: measure.Step, case: Case, question: str, configurations: Sequence[Any], settled: dict[str, Any], timer: Timer
) -> Iterator[Trial]:
    from repdeg_fast.triton_kernels import tuning

    expected: list[Tensor] = []
    for configuration in configurations:
        answers = {**settled, question: configuration}
        with tuning.answering(lambda asked, listed, answers=answers: answers.get(asked, listed[0])):
            try:
                found = _results(step)
                expected = expected or found
                if not all(_close(a, b, TOLERANCE[case.dtype]) for a, b in zip(found, expected, strict=True)):
                    yield Trial(question, configuration, None, "other values than the one that ships")
                    continue
                yield Trial(question, configuration, timer(step))
            except Exception as failure:  # too large for this chip, for example
                yield Trial(question, configuration, None, measure.describe(failure))


def _results(step: measure.Step) -> list[Tensor]:
    """The output and the gradients, for the same noise each time."""
    step.reset()
    torch.manual_seed(0)
    output = step.run().detach()
    return [output, *(leaf.grad.clone() for leaf in step.leaves if leaf.grad is not None)]


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    scale = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() <= 2 * tolerance * scale


def fastest(trials: Sequence[Trial]) -> Any:
    """The configuration that ships unless another one is clearly faster."""
    shipped = trials[0]
    best = min((trial for trial in trials if trial.ms is not None), key=lambda trial: trial.ms or 0, default=shipped)
    if shipped.ms is not None and best.ms is not None and best.ms > (1 - _GAIN) * shipped.ms:
        return shipped.configuration
    return best.configuration


def median_timer(device: torch.device, seconds: float) -> Timer:
    return lambda step: statistics.median(measure.time_steps([step], device, seconds, lambda i: None)[0])
