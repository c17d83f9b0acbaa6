"""Time on a GPU: a step in turn on several sets of inputs, replayed as a CUDA graph where it can be captured.

Several sets, because what one step leaves in the L2 cache is not there for the next one in training: together they are
a few times as large as the cache. A graph, because in small cases the host would be what is measured; its time has a
column of its own. ``triton.testing.do_bench`` does neither: it overwrites the cache before each repeat, which leaves
as many bytes there that must be written back first, and hides about 60 µs of the host's time behind that.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_CACHES = 3  # L2 caches that the inputs of all sets would fill
_MOST_SETS = 128
_MEMORY_SHARE = 0.25  # of the free memory that all sets may take
_FEWEST_TURNS, _MOST_TURNS = 5, 200
_FEWEST_CALLS, _MOST_CALLS = 3, 20  # for the host's time
_SHARE = 0.2  # of the seconds that a user gives for a provider: a GPU's repeats differ little

GRAPH, EVENTS = "graph", "events"


class Repeatable(Protocol):
    """What is timed: :class:`repdeg_fast.bench.measure.Step`."""

    def reset(self) -> None: ...
    def run(self) -> Tensor: ...


@dataclass(frozen=True)
class Timing:
    """``samples``: milliseconds of a step, each the mean of one turn through all sets; ``host_us``: microseconds that
    the host needs for a call, without waiting for what it asked for; ``method``: how the samples were taken."""

    samples: list[float]
    method: str
    host_us: float


class Gpu:
    """What timing needs of a device. Tests put another one in its place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """``run`` as a graph: a function that replays it. Raises ``RuntimeError`` where it cannot be captured."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._check_that_nothing_waits(run)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                run()
        except RuntimeError:
            # it would go on waiting for the end of the capture, and refuse to draw numbers
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            raise
        return graph.replay

    @staticmethod
    def _check_that_nothing_waits(run: Callable[[], None]) -> None:
        """Known without a capture that fails, which leaves more behind than the error."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@functools.cache
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)


def sets_needed(input_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """How many sets of inputs it takes for each to be gone from the cache when its turn comes again."""
    wanted = -(-_CACHES * cache_bytes // max(1, input_bytes))
    affordable = int(_MEMORY_SHARE * free_bytes) // max(1, input_bytes)
    return max(1, min(wanted, affordable, _MOST_SETS))


def bytes_on(device: torch.device, tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of the tensors that lie on a device of that type."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def time_in_turn(steps: Sequence[Repeatable], gpu: Gpu, seconds: float) -> Timing:
    """One step on several sets of inputs, about ``seconds`` long, each of which has run before."""

    def turn() -> None:
        for step in steps:
            step.reset()
            step.run()

    budget = _SHARE * seconds
    turn()
    host_us = host_microseconds(steps, gpu, budget)
    sets = f"{len(steps)} set{'s' * (len(steps) > 1)} of inputs"
    try:
        replay, method = gpu.capture(turn), f"{GRAPH}, {sets}"
    except RuntimeError as failure:
        gpu.synchronize()  # raises where more is broken than the capture
        first_line = (str(failure).strip().splitlines() or [""])[0]
        replay, method = turn, f"{EVENTS}, {sets}; not captured: {first_line}"
    samples = [ms / len(steps) for ms in turn_times(replay, gpu, budget)]
    for step in steps:
        step.reset()
    return Timing(samples, method, host_us)


def turn_times(turn: Callable[[], Any], gpu: Gpu, seconds: float) -> list[float]:
    """Milliseconds of each of several turns. All are asked for at once, so that none waits for the host where the host
    is the faster one."""
    (estimate,) = _timed(turn, gpu, 1)
    count = max(_FEWEST_TURNS, min(_MOST_TURNS, int(1e3 * seconds / max(estimate, 1e-3))))
    return _timed(turn, gpu, count)


def _timed(turn: Callable[[], Any], gpu: Gpu, count: int) -> list[float]:
    """Of ``count`` turns, after one that the GPU is busy with while the host asks for them."""
    turn()
    stamps = [gpu.stamp()]
    for _ in range(count):
        turn()
        stamps.append(gpu.stamp())
    gpu.synchronize()
    return [gpu.ms(start, end) for start, end in itertools.pairwise(stamps)]


def host_microseconds(steps: Sequence[Repeatable], gpu: Gpu, seconds: float) -> float:
    """Of one call: the median of calls each of which finds the GPU idle, so that none waits for room in its queue."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST_CALLS or (len(times) < _MOST_CALLS and time.perf_counter() < end):
        step = steps[len(times) % len(steps)]
        step.reset()
        gpu.synchronize()
        start = time.perf_counter()
        output = step.run()
        times.append(time.perf_counter() - start)
        del output
    return 1e6 * statistics.median(times)
