"""What a call costs beside its kernels: forward and backward at sizes where there is next to nothing to compute.

On a GPU the host must prepare the next kernel while one runs; where it takes longer than the kernel, it is what is
measured. Each operation stands beside the same formula in eager PyTorch, both called in turn, one thread; on a GPU
without waiting for it. Processor time, not the clock's: what other processes do matters less. Times vary between
machines and minutes all the same, ratios far less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.reference import cosreg

ROWS, WIDTH, VOCABULARY, HEADS = 8, 16, 16, 3
_CALLS = 20  # between two looks at the clock

Step = Callable[[], Tensor]  # a forward pass, to a scalar


@dataclass(frozen=True)
class Pair:
    """An operation and the eager form of its formula; ``goal``: the largest ratio of their times that we accept."""

    name: str
    goal: float
    eager: Step
    ours: Callable[[], Any]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Overhead:
    """Medians: µs of the host for a forward and a backward pass, the ratio of times taken in turn, and how many kernels
    (on a CPU: operators of PyTorch that call no other) one pass of each runs."""

    pair: Pair
    eager_us: float
    ours_us: float
    ratio: float
    eager_kernels: int
    ours_kernels: int


def measure(device: torch.device, seconds: float) -> Iterator[Overhead]:
    """Each operation for about ``seconds``."""
    with _one_thread():
        for pair in pairs(device):
            eager, ours = _step(pair.eager, pair.leaves), _step(pair.ours, pair.leaves)
            for _ in range(_CALLS):
                eager(), ours()
            rounds: list[tuple[float, float]] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not rounds:
                rounds.append((_microseconds(eager, device), _microseconds(ours, device)))
            ratio = statistics.median(after / before for before, after in rounds)
            eager_us, ours_us = (statistics.median(times) for times in zip(*rounds, strict=True))
            yield Overhead(pair, eager_us, ours_us, ratio, _kernels(eager, device), _kernels(ours, device))


def table(found: list[Overhead], device: torch.device) -> Table:
    out = Table(title=f"host time of a call, forward and backward, {ROWS} × {WIDTH} values on {device}")
    out.add_column("operation", no_wrap=True)
    for name in ("eager µs", "ours µs", "ours/eager", "goal", "eager", "ours"):
        out.add_column(name + " kernels" * (name in ("eager", "ours")), justify="right")
    for row in found:
        figures = (f"{row.eager_us:.0f}", f"{row.ours_us:.0f}", f"{row.ratio:.2f}", f"≤ {row.pair.goal:g}")
        style = None if row.ratio <= row.pair.goal else "red"
        out.add_row(row.pair.name, *figures, str(row.eager_kernels), str(row.ours_kernels), style=style)
    return out


def pairs(device: torch.device) -> Iterator[Pair]:
    generator = torch.Generator(device).manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, generator=generator, device=device).requires_grad_()  # noqa: E731
    x, branch, omega, gamma, beta = leaf(ROWS, WIDTH), leaf(ROWS, WIDTH), leaf(WIDTH), leaf(WIDTH), leaf(WIDTH)
    gamma.data.add_(3)  # away from zero, so that the output alone is kept

    yield Pair(
        "admin_norm",
        1.5,
        lambda: F.layer_norm(x * omega + branch, (WIDTH,), gamma, beta).sum(),
        lambda: repdeg_fast.admin_norm(x, branch, omega, gamma, beta).sum(),
        (x, branch, omega, gamma, beta),
    )
    yield Pair(
        "cosine_regularization",
        0.8,
        lambda: cosreg.closed_form(x),
        lambda: repdeg_fast.cosine_regularization(x),
        (x,),
    )
    weight, bias, hidden = leaf(VOCABULARY, WIDTH), leaf(VOCABULARY), leaf(HEADS, ROWS, WIDTH)
    mixture_logits = leaf(ROWS, HEADS)
    target = torch.randint(VOCABULARY, (ROWS,), generator=generator, device=device)
    head = (weight, bias)
    yield Pair(
        "linear_cross_entropy",
        3.0,
        lambda: F.cross_entropy(F.linear(x, *head), target),
        lambda: repdeg_fast.linear_cross_entropy(x, weight, target, bias),
        (x, *head),
    )
    layers = tuple(hidden)
    yield Pair(
        "multi_layer_mlm_loss",
        2.0,
        lambda: torch.stack([F.cross_entropy(F.linear(layer, *head), target) for layer in layers]).sum(),
        lambda: repdeg_fast.multi_layer_mlm_loss(hidden, weight, target, bias).sum(),
        (hidden, *head),
    )
    yield Pair(
        "gumbel_mix",
        1.5,
        lambda: _eager_gumbel_mix(hidden, mixture_logits, weight, bias).sum(),
        lambda: repdeg_fast.gumbel_mix(hidden, mixture_logits, weight, bias)[1].sum(),
        (mixture_logits, weight),
    )


def _eager_gumbel_mix(hidden: Tensor, mixture_logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As published: the K logits are mixed, and PyTorch draws the noise."""
    logits = F.linear(hidden, weight.detach(), bias.detach()).detach()
    mixed = (mixture_logits.softmax(dim=1).T[:, :, None] * logits).sum(dim=0)
    return F.gumbel_softmax(mixed, tau=0.3, hard=True) @ weight


def _step(forward: Callable[[], Any], leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(forward(), leaves)

    return step


def _microseconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.process_time()
    for _ in range(_CALLS):
        step()
    return (time.process_time() - start) / _CALLS * 1e6


def _kernels(step: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as on_gpu:
            step()
            torch.cuda.synchronize(device)
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in on_gpu.events() or [])
    with torch.autograd.profiler.profile(use_kineto=False) as on_cpu:
        step()
    events = on_cpu.function_events or []
    return sum("::" in event.name and not any("::" in child.name for child in event.cpu_children) for event in events)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
