"""Memory: what a pass allocates, when, and what it keeps for the backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from repdeg_fast.bench.measure import Step
from repdeg_fast.bench.suite import Inputs
from repdeg_fast.ops import buffers

_PHASE = "repdeg_fast phase: "


@dataclass(frozen=True)
class Timeline:
    """Bytes above what was there before the pass: (ms, bytes) after each allocation or release, and for each phase
    its start and end in ms."""

    points: list[tuple[float, int]]
    phases: dict[str, tuple[float, float]]

    def peak(self, phase: str | None = None) -> int:
        """The most bytes held at once, in one phase or in all."""
        start, end = self.phases[phase] if phase else (float("-inf"), float("inf"))
        return max([self.at(start), *(size for ms, size in self.points if start <= ms <= end)])

    def at(self, moment: float) -> int:
        return next((size for ms, size in reversed(self.points) if ms <= moment), 0)


def record(step: Step, device: torch.device) -> Timeline:
    """Run ``step`` once under the profiler. Scratch memory inside C++ and Triton kernels is allocated through torch,
    and so is seen like any other; what earlier calls kept is given back first, so that this one has to take it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each use prints two lines to stderr
    from torch.profiler import ProfilerActivity, profile

    def phase(name: str) -> AbstractContextManager:
        return torch.profiler.record_function(_PHASE + name)

    step.reset()
    buffers.release()
    _synchronize(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with phase("both passes" if step.graph_free else "forward"):
            output = step.forward()
        if step.backward:
            with phase("backward"):
                step.differentiate(output)
        _synchronize(device)
        del output
    return _timeline(profiler.profiler.kineto_results.events(), device)


def _timeline(events: list, device: torch.device) -> Timeline:
    events = sorted(events, key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name().startswith(_PHASE))
    kind = device.type.upper()
    points, phases, held = [], {}, 0
    for event in events:
        ms = (event.start_ns() - start) / 1e6
        if event.name().startswith(_PHASE):
            phases[event.name().removeprefix(_PHASE)] = (ms, ms + event.duration_ns() / 1e6)
        elif event.name() == "[memory]" and str(event.device_type()).endswith(kind):
            held += event.nbytes()
            points.append((ms, held))
    return Timeline(points, phases)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that one pass holds beyond its inputs, fresh gradients included."""
    if device.type != "cuda":
        return record(step, device).peak()
    step.reset()
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    output = step.run()
    _synchronize(device)
    del output
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(call: Callable[[], Tensor], inputs: Inputs) -> int:
    """Bytes that autograd keeps between the passes: distinct storages that are not those of the inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(storage.nbytes() for storage in saved.values())


def record_snapshot(step: Step, device: torch.device, path: str) -> None:
    """PyTorch's own record of every CUDA allocation with its stack, for https://pytorch.org/memory_viz."""
    step.reset()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        step.run()
        _synchronize(device)
        torch.cuda.memory._dump_snapshot(path)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
