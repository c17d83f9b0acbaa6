"""Where the memory of one training step goes, phase by phase."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from repdeg_fast.bench import memory
from repdeg_fast.bench.measure import Step, clear_gradients, describe, unfit
from repdeg_fast.bench.memory import Timeline
from repdeg_fast.bench.suite import Case, Inputs, Provider, Suite

_LONGEST = 100  # characters of a case's name in a file name, which has room for 255 bytes


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


def file_name(text: str) -> str:
    """``text`` (a case named after a tensor, say) as part of a file name; of a long one the end, which tells more."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)[-_LONGEST:]
