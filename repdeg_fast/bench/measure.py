"""Time: interleaved repeats on the CPU, :mod:`gpu_timing` on a GPU, and the roof that both are held to."""

from __future__ import annotations

import copy
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repdeg_fast.bench import gpu_timing
from repdeg_fast.bench.suite import FORWARD, Case, Inputs, Provider, Suite, Work, leaves

MIN_ROUNDS, MAX_ROUNDS = 3, 25
_LONGEST_STEP = 10.0  # seconds that one step of a wasteful provider may take, by its own count of operations
_MEMORY_SHARE = 0.8  # of the free memory that one provider may ask for


def unfit(provider: Provider, case: Case, inputs: Inputs, device: torch.device) -> str | None:
    """Why ``provider`` cannot run this case here: its own reason, too little memory, or too long a wait."""
    if case.group and not provider.in_sweeps:
        return "grows too fast to be part of a sweep; see the other cases"
    if (reason := provider.unavailable(inputs)) or provider.needs is None:
        return reason
    needs, free = provider.needs(case), free_bytes(device)
    if needs.bytes > _MEMORY_SHARE * free:
        return f"needs about {needs.bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    seconds = needs.flops / roof(device, case.dtype).gemm
    if seconds > _LONGEST_STEP:
        return f"would take {seconds:.0f} s a step or more"
    return None


def describe(failure: Exception) -> str:
    """An exception as the reason of a row: its type and first line."""
    first_line = (str(failure).strip().splitlines() or [""])[0]
    return f"failed: {type(failure).__name__}: {first_line}"


class Step:
    """One pass of one provider: ``reset`` before, outside the timed region, then ``run``."""

    def __init__(self, provider: Provider, call: Callable[[], Tensor], inputs: Inputs, pass_: str) -> None:
        self.graph_free = provider.graph_free
        self.leaves = leaves(inputs)
        self.backward = pass_ != FORWARD and not provider.graph_free
        self._call = call
        self._upstream: Tensor | None = None

    def of_pass(self, pass_: str) -> Step:
        """The same step with or without its backward pass."""
        step = copy.copy(self)
        step.backward = pass_ != FORWARD and not self.graph_free
        return step

    def reset(self) -> None:
        """A fresh gradient each time; for the graph-free form one that is already there."""
        for leaf in self.leaves:
            if not self.graph_free:
                leaf.grad = None
            elif leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)

    def forward(self) -> Tensor:
        return self._call()

    def differentiate(self, output: Tensor) -> None:
        if self._upstream is None:  # in the first run, which warms up
            self._upstream = torch.ones_like(output)
        torch.autograd.backward(output, self._upstream)

    def run(self) -> Tensor:
        output = self._call()
        if self.backward:
            self.differentiate(output)
        return output


def rotation(suite: Suite, case: Case, inputs: Inputs, device: torch.device) -> list[Inputs]:
    """``inputs``, and on a GPU as many copies as it takes for none to be in its cache when its turn comes again."""
    if device.type != "cuda":
        return [inputs]
    size = gpu_timing.bytes_on(device, inputs.values())
    count = gpu_timing.sets_needed(size, gpu_timing.cache_bytes(device), free_bytes(device))
    return [inputs, *(suite.make_inputs(case, device) for _ in range(count - 1))]


def steps(provider: Provider, sets: Sequence[Inputs]) -> list[Step]:
    """The provider's longest pass on each set of inputs."""
    return [Step(provider, provider.prepare(inputs), inputs, provider.passes[-1]) for inputs in sets]


def lost(device: torch.device) -> str | None:
    """Why nothing more can run on ``device`` in this process: after an illegal address, say, every call fails."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as failure:
        return describe(failure)
    return None


def time_steps(
    steps: Sequence[Step], seconds: float, done: Callable[[int], None] = lambda i: None
) -> list[list[float]]:
    """Milliseconds of each repeat of each step on a CPU; about ``seconds`` a step. ``done(i)`` after step i's last
    repeat."""
    samples = [[_once(step)] for step in steps]  # warm: each ran when it was checked, and when its memory was counted
    rounds = [min(MAX_ROUNDS, max(MIN_ROUNDS, int(1e3 * seconds / first))) for (first,) in samples]
    for turn in range(1, max(rounds, default=0)):
        order = [i for i in range(len(steps)) if turn < rounds[i]]
        shift = turn % len(order)
        for i in order[shift:] + order[:shift]:  # nobody always runs after the same neighbour
            samples[i].append(_once(steps[i]))
            if len(samples[i]) == rounds[i]:
                done(i)
    for step in steps:
        clear_gradients(step.leaves)
    return samples


def _once(step: Step) -> float:
    step.reset()
    start = time.perf_counter()
    output = step.run()
    elapsed = time.perf_counter() - start
    del output  # freeing a graph is not part of the pass
    return 1e3 * elapsed


def clear_gradients(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def speedup(base: Sequence[float], other: Sequence[float], device: torch.device) -> float:
    """How many times faster ``other`` is. On the CPU the median of the ratios within each round, which cancels what
    else the machine was doing; a GPU's repeats are not interleaved, so there the ratio of the medians."""
    if device.type == "cuda":
        return statistics.median(base) / statistics.median(other)
    return statistics.median(b / o for b, o in zip(base, other, strict=False))


def percentile(samples: Sequence[float], share: float) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(share))


@dataclass(frozen=True)
class Roof:
    """Measured on this machine: bytes a second of a large copy (read + written), operations a second of a GEMM."""

    copy: float
    gemm: float

    def percent(self, work: Work, ms: float) -> float:
        """What the roof would take, in per cent of what was taken. Above 100 where the data lies in a cache."""
        return 100 * max(work.bytes / self.copy, work.flops / self.gemm) / (1e-3 * ms)


@functools.cache
def roof(device: torch.device, dtype: torch.dtype) -> Roof:
    large = device.type == "cuda"
    source = torch.zeros((2**30 if large else 2**27) // 4, device=device)
    target = torch.zeros_like(source)
    copy = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)
    n = 8192 if large else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return Roof(copy, gemm=2 * n**3 / _median_seconds(lambda: a @ b, device))


def _median_seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        return 1e-3 * statistics.median(gpu_timing.turn_times(function, gpu_timing.gpu(device), seconds=0.1))
    function()
    samples = []
    for _ in range(9):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(device: torch.device) -> dict[str, str | int | None]:
    """What a figure depends on beside the code under test."""
    import repdeg_fast
    from repdeg_fast import backends
    from repdeg_fast.bench import peers

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "repdeg_fast": repdeg_fast.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        **{peer.package: peer.version for peer in peers.PACKAGES},
        # by `repdeg-fast tune`: not the configurations that ship
        "tuned": "by repdeg-fast tune" if backends.tuning_file().exists() else None,
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),  # huge pages for all of torch's CPU memory
    }
