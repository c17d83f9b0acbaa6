"""Where the memory of one training step goes, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from repdeg_fast.bench import memory
from repdeg_fast.bench.measure import Step, clear_gradients, describe, unfit
from repdeg_fast.bench.memory import Timeline
from repdeg_fast.bench.outputs import file_name
from repdeg_fast.bench.report import format_bytes
from repdeg_fast.bench.suite import Case, Inputs, Provider, Suite


@dataclass(frozen=True)
class Profile:
    """One provider's memory, or the reason why there is none."""

    provider: Provider
    timeline: Timeline | None = None
    saved: int = 0
    snapshot: Path | None = None
    reason: str | None = None


def profile_case(
    suite: Suite,
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    folder: Path,
    tick: Callable[[str], None] = lambda text: None,
) -> list[Profile]:
    torch._dynamo.reset()
    inputs = suite.make_inputs(case, device)
    found = []
    for provider in providers:
        tick(provider.name)
        reason = unfit(provider, case, inputs, device) or provider.floor
        if reason:
            found.append(Profile(provider, reason=reason))
            continue
        snapshot = folder / f"{suite.op}-{file_name(case.name)}-{provider.name}-snapshot.pickle"
        try:
            found.append(_profile(provider, inputs, device, snapshot if device.type == "cuda" else None))
        except Exception as failure:  # a peer that does not work here is a row like others
            found.append(Profile(provider, reason=describe(failure)))
    return found


def _profile(provider: Provider, inputs: Inputs, device: torch.device, snapshot: Path | None) -> Profile:
    call = provider.prepare(inputs)
    step = Step(provider, call, inputs, provider.passes[-1])
    step.reset()
    step.run()  # compile and warm up
    saved = 0 if provider.graph_free else memory.saved_bytes(call, inputs)
    timeline = memory.record(step, device)
    if snapshot:
        memory.record_snapshot(step, device, str(snapshot))
    clear_gradients(step.leaves)
    return Profile(provider, timeline, saved, snapshot)


def table(suite: Suite, case: Case, profiles: Sequence[Profile], device: torch.device) -> Table:
    title = f"{suite.op} · {case} on {device.type}: memory beyond the inputs"
    out = Table(title=escape(title), title_justify="left")
    out.add_column("provider", no_wrap=True)
    for name in ("forward peak", "saved for backward", "held after forward", "backward peak", "held after"):
        out.add_column(name, justify="right")
    out.add_column("note", overflow="fold")
    for profile in profiles:
        name, timeline = profile.provider.name, profile.timeline
        if timeline is None:
            out.add_row(name, *["–"] * 5, f"[dim]{escape(profile.reason or '')}[/]")
            continue
        first = next(iter(timeline.phases))  # forward; or both passes, where one call does them
        backward = "backward" in timeline.phases
        out.add_row(
            name,
            format_bytes(timeline.peak(first)),
            "–" if profile.provider.graph_free else format_bytes(profile.saved),
            format_bytes(timeline.at(timeline.phases[first][1])),
            format_bytes(timeline.peak("backward")) if backward else "–",
            format_bytes(timeline.points[-1][1] if timeline.points else 0),
            "adds to the gradient that is there: both passes in one call" if profile.provider.graph_free else "",
            style="bold" if profile.provider.ours else None,
        )
    return out
