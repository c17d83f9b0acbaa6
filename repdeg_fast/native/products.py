"""How large matrix products are made on this machine: measured at first use, and kept beside the compiled library.

PyTorch's own call shares a product between the threads of its BLAS library (MKL, OpenBLAS). csrc/cpu/gemm.h can let
each thread multiply pieces by itself instead, and can hand fp32 pieces to oneDNN, which is inside PyTorch, too, and
compiles its kernels for the processor it finds. Which is fastest depends on the processor's maker, its instruction sets
and the number of threads, by a factor of two and not always the same way. ``REPDEG_FAST_PRODUCTS`` names one instead.

``batch-invariant`` is never measured: oneDNN for every product, with sums that are cut in the same places whatever the
number of rows, so that a row has the same bits alone and among others.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from repdeg_fast.native import Namespace, build, cache

VARIABLE = "REPDEG_FAST_PRODUCTS"
BATCH_INVARIANT = "batch-invariant"
MEASURED = {"library": (False, False, False), "pieces": (True, False, False), "onednn": (True, True, False)}
WAYS = {**MEASURED, BATCH_INVARIANT: (True, True, True)}  # arguments of use_products
_BUDGET = 0.15  # seconds of measuring
_MARGIN = 1.03  # how much faster another way must be than PyTorch's own, which has the smallest error

_chosen: dict[int, str] = {}  # by number of threads
_in_use: tuple[int, str] | None = None

Round = Callable[[str], float]  # way -> seconds that one round of products took


def settle(operators: Namespace) -> str:
    """Let the native products be made in the way that is fastest for the number of threads there are; returns it."""
    global _in_use
    threads = torch.get_num_threads()
    if _in_use is not None and _in_use[0] == threads:
        return _in_use[1]
    if threads not in _chosen:
        _chosen[threads] = _asked_for() or _kept(threads) or _measured(operators, threads)
    way = _chosen[threads]
    if not operators.use_products.default(*WAYS[way]):  # PyTorch has no oneDNN
        if way == BATCH_INVARIANT:
            raise RuntimeError(f"{VARIABLE}={way} needs oneDNN, without which this PyTorch was built; unset it")
        way = _chosen[threads] = "pieces"
    if way == BATCH_INVARIANT and not _rows_keep_their_bits(operators):
        raise RuntimeError(
            f"{VARIABLE}={way}: here PyTorch's oneDNN gives a row other bits in another batch (so does torch"
            f" before 2.13); unset it, or try another version of torch"
        )
    _in_use = threads, way
    return way


def batch_invariant() -> bool:
    """Whether no bit of a row may depend on other rows."""
    return _asked_for() == BATCH_INVARIANT


def _rows_keep_their_bits(operators: Namespace) -> bool:
    """Whether what batch invariance stands on is so here: oneDNN has kernels of its own for each processor and version.
    Rows alone against the same among others, weights as they lie and transposed."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for width, columns in ((40, 1100), (384, 70), (768, 513)):
            a, b = (torch.randn(shape, generator=generator) for shape in ((129, width), (columns, width)))
            for weight in (b.t(), b.t().contiguous()):
                whole = _product(operators, a, weight)
                for part in (slice(0, 1), slice(0, 2), slice(3, 10), slice(64, 129), slice(128, 129)):
                    if not torch.equal(_product(operators, a[part], weight), whole[part]):
                        return False
    return True


def _product(operators: Namespace, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    operators.linear_cross_entropy_multiply.default(out, a, b, False)
    return out


def forget() -> None:
    """Look anew at the next call."""
    global _in_use
    _chosen.clear()
    _in_use = None


def fastest(time_of: Round, budget: float = _BUDGET) -> str:
    """The way whose rounds take least time, all in turn until the budget is spent; ``library`` where none is better."""
    seconds: dict[str, list[float]] = {way: [time_of(way)] for way in MEASURED}  # the first also warms up
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for way in MEASURED:
            seconds[way].append(time_of(way))
    shortest = {way: min(times) for way, times in seconds.items()}
    best = min(MEASURED, key=lambda way: shortest[way])
    return best if shortest[best] * _MARGIN < shortest["library"] else "library"


def file() -> Path:
    return cache.cache_root() / "products.json"


def _asked_for() -> str | None:
    way = os.environ.get(VARIABLE)
    if way and way not in WAYS:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(WAYS)}, got {way!r}")
    return way or None


def _kept(threads: int) -> str | None:
    way = _read().get(_key(threads))
    return way if way in MEASURED else None


def _keep(threads: int, way: str) -> None:
    """Where another process keeps something at the same moment one of them wins; the other measures again."""
    with suppress(OSError):  # a folder that cannot be written: every process measures
        cache.write(file(), json.dumps({**_read(), _key(threads): way}, indent=1) + "\n")


def _read() -> dict[str, str]:
    with suppress(OSError, ValueError):  # none yet, or cut short
        found = json.loads(file().read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _key(threads: int) -> str:
    """What decides: folders are shared between machines."""
    return f"{build.processor()}, torch {torch.__version__}, {threads} threads"


def _measured(operators: Namespace, threads: int) -> str:
    way = fastest(_timer(operators, threads))
    _keep(threads, way)
    return way


def _timer(operators: Namespace, threads: int) -> Round:
    """Of the three products of a vocabulary's head, small: logits, and the gradients of hidden states and weight."""
    rows, width, vocabulary = 256, 256, 2048 * threads
    with torch.inference_mode():
        hidden, weight, logits = (torch.full(s, 0.5) for s in ((rows, width), (vocabulary, width), (rows, vocabulary)))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    products = ((logits, hidden, weight.t()), (grad_hidden, logits, weight), (grad_weight, logits.t(), hidden))

    def round_of(way: str) -> float:
        operators.use_products.default(*WAYS[way])
        start = time.perf_counter()
        for out, a, b in products:
            operators.linear_cross_entropy_multiply.default(out, a, b, False)
        return time.perf_counter() - start

    return round_of
