"""Gumbel mixing: the K logits tensors of published code, the same with hidden states mixed in their place, ours, and
the products that make the logits.

The embedding is the heads' projection, as in AMOS: the value and the gradient come from rows of ``weight``.

PyTorch's forms draw noise of their own, so there is no value that they could be held to. Ours is held to the sample
that the seed stands for: with h̄ rounded to the dtype of the products, as every kernel has it, and in float64 from there
on. Without that rounding a few rows of a 16-bit case would rightly get other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast._mixture import mix
from repdeg_fast.bench import products
from repdeg_fast.bench.suite import (
    FORWARD,
    TOLERANCE,
    Case,
    Inputs,
    Provider,
    Suite,
    Work,
    compiled,
    per_backend,
    relative_error,
)
from repdeg_fast.bench.suites.linear_cross_entropy import case_of_weights, heads, operands
from repdeg_fast.ops.gumbel_mix import operation
from repdeg_fast.reference import philox

_COLUMNS = 4096  # logits a row of the exact value that are in float64 at a time
_NEAR_TIES = 0.01  # of all rows: if more got another token, something is wrong
TEMPERATURE = 0.3
SEED = 2204_03243


CASES = [
    heads("bert-512", 3, 512, 30522, 768, default_on=("cpu",)),
    heads("small", 3, 64, 30522, 384, default_on=(), brief=True),
    heads("amos-base", 3, 4915, 32768, 768, default_on=("cuda",), dtype=torch.bfloat16),
    *(heads(f"sweep-{v}", 3, 256, v, 256, group="sweep", default_on=("cuda",)) for v in (4096, 16384, 65536)),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    inputs = operands(case, generator)
    size = (case.sizes["M"], case.sizes["K"])
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": case.dtype}
    return inputs | {
        "mixture_logits": torch.randn(*size, **options).requires_grad_(),
        "seed": torch.tensor([SEED], device=device),
    }


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    """The embeddings of the tokens that the seed stands for, from logits in float64, a tile of them at a time."""
    weight, mixed = inputs["weight"], mix(inputs["hidden_states"], inputs["mixture_logits"]).double()
    best, token_ids = mixed.new_full((len(mixed),), float("-inf")), inputs["seed"].new_zeros(len(mixed))
    for first in range(0, len(weight), _COLUMNS):
        tile = weight[first : first + _COLUMNS].double()
        noise = philox.gumbel(inputs["seed"], range(len(mixed)), range(first, first + len(tile)), dtype=torch.float64)
        value, column = (noise.addmm_(mixed, tile.T)).max(dim=1)
        token_ids = torch.where(value > best, first + column, token_ids)
        best = torch.maximum(value, best)
    return weight[token_ids].double()


@torch.no_grad()
def error(inputs: Inputs, output: Tensor, exact: Tensor) -> float:
    """Relative, of the rows that got the best token or another one that scores less than the best one: a single row of
    4,915 whose token went the other way at a near-tie would be an error of √(2/4,915) = 0.02."""
    other = (output.double() != exact).any(dim=1).nonzero().flatten().tolist()
    if len(other) > _NEAR_TIES * len(exact):
        return relative_error(output, exact)
    settled = [row for row in other if _drawn_within_rounding(inputs, row, output[row])]
    exact = exact.index_copy(0, torch.tensor(settled, device=exact.device, dtype=torch.long), output[settled].double())
    return relative_error(output, exact)


def _drawn_within_rounding(inputs: Inputs, row: int, embedding: Tensor) -> bool:
    """Whether it is that of a token whose score is the best one to within the tolerance."""
    weight = inputs["weight"]
    mixed = mix(inputs["hidden_states"][:, row : row + 1], inputs["mixture_logits"][row : row + 1]).double()
    noise = philox.gumbel(inputs["seed"], range(row, row + 1), range(len(weight)), dtype=torch.float64)
    scores = (noise + mixed @ weight.double().T).squeeze(0)
    candidates = weight[scores >= scores.max() - TOLERANCE[weight.dtype]]
    return bool((candidates == embedding).all(dim=1).any())


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """The product that makes the logits, forward and again backward, where it replaces keeping them: F[v]·r and dz E
    are needed for tokens alone that weigh something, 7 % of 30,522 at τ = 0.3.

    Forward reads the hidden states, the mixture logits and the weight, and writes a row of the embedding for each of
    the M; backward reads all that again, with the gradient of these, and writes those of the weight and of the mixture
    logits.
    """
    k, m, v, d = (case.sizes[name] for name in "KMVd")
    size, operands = case.dtype.itemsize, k * m * d + m * k + v * d
    if pass_ == FORWARD:
        return Work(size * (operands + m * d), 2 * m * v * d)
    return Work(size * (2 * operands + 2 * m * d + v * d + m * k), 4 * m * v * d)


def _matrices(all_heads: bool, wide: int) -> Callable[[Case], Work]:
    """What providers need that hold logits, of all heads or of the mixture alone, and some fp32 matrices of that size.
    In operations they waste little."""

    def needs(case: Case) -> Work:
        k, m, v, _ = (case.sizes[name] for name in "KMVd")
        size = case.dtype.itemsize
        return Work(((k if all_heads else 0) * size + size + wide * max(4, size)) * m * v, 0)

    return needs


def _published(hidden_states: Tensor, mixture_logits: Tensor, weight: Tensor) -> Tensor:
    """The heads' logits are there for their losses, and are detached; they get mixed, and the mixture sampled."""
    alpha = repdeg_fast.gradient_reversal(mixture_logits).softmax(dim=1)
    logits = hidden_states @ weight.detach().T
    return embedded_sample(torch.einsum("mk,kmv->mv", alpha, logits), weight)


def _mixed_first(hidden_states: Tensor, mixture_logits: Tensor, weight: Tensor) -> Tensor:
    """Our algebra without our kernels: one product instead of K."""
    mixed = mix(hidden_states, repdeg_fast.gradient_reversal(mixture_logits))
    return embedded_sample(mixed @ weight.detach().T, weight)


def embedded_sample(logits: Tensor, embedding: Tensor) -> Tensor:
    """Straight-through: a product with one-hot rows, since the gradient of the soft sample has to pass."""
    one_hot = F.gumbel_softmax(logits.to(arithmetic_dtype(logits)), tau=TEMPERATURE, hard=True)
    return one_hot.to(embedding.dtype) @ embedding


def _ours(inputs: Inputs) -> Tensor:
    arguments = (inputs["hidden_states"], inputs["mixture_logits"], inputs["weight"])
    return repdeg_fast.gumbel_mix(*arguments, temperature=TEMPERATURE, seed=inputs["seed"])[1]


def _prepare_gemms(inputs: Inputs) -> Callable[[], Tensor]:
    """h̄ Eᵀ forward, and again backward: see :func:`work`."""
    weight, mixed = inputs["weight"].detach(), inputs["hidden_states"][0]
    logits = [(mixed, weight.t(), products.new_rows(mixed, len(mixed), len(weight)))]
    return products.prepare(inputs["weight"], forward=logits, backward=logits)


def _torchs(name: str, function: Callable[..., Tensor], needs: Callable[[Case], Work], compile_: bool) -> Provider:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        run = compiled(function) if compile_ else function
        return lambda: run(inputs["hidden_states"], inputs["mixture_logits"], inputs["weight"])

    return Provider(name, prepare, needs=needs, own_noise=True)


PROVIDERS = [
    Provider("gemms", _prepare_gemms, needs=_matrices(False, wide=0), floor="a floor: logits alone"),
    _torchs("eager", _published, _matrices(True, wide=6), compile_=False),
    replace(_torchs("compile", _published, _matrices(True, wide=2), compile_=True), in_brief=False),
    _torchs("compile-mixed-first", _mixed_first, _matrices(False, wide=3), compile_=True),
    *per_backend(operation, _ours, lambda inputs: [inputs["hidden_states"], inputs["weight"]]),
]

SUITE = Suite(
    op="gumbel_mix",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["V"],
    size_label="V",
    value_name="mean embedding",
    case_of_weights=case_of_weights,
    error=error,
)
