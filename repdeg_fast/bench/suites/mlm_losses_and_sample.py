"""A step of AMOS's heads, losses and sample: published code, which makes the K logits once and uses them for both; ours
in one sweep and as two functions; and the losses alone, since the question is what the sample costs besides.

The value is the mean loss plus the mean of the embeddings, so that gradients flow through both. PyTorch's forms draw
noise of their own and are not compared. Ours make the losses' gradients in the forward pass, which alone compares with
nothing but ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.bench.suite import (
    FORWARD_BACKWARD,
    Case,
    Inputs,
    Provider,
    Suite,
    Work,
    compiled,
    per_backend,
)
from repdeg_fast.bench.suites import gumbel_mix, linear_cross_entropy
from repdeg_fast.bench.suites.gumbel_mix import SEED, TEMPERATURE, embedded_sample
from repdeg_fast.bench.suites.linear_cross_entropy import heads
from repdeg_fast.ops.linear_cross_entropy import operation

CASES = [
    heads("bert-512", 3, 512, 30522, 768, default_on=("cpu",)),
    heads("small", 3, 64, 30522, 384, default_on=(), brief=True),
    heads("amos-base", 3, 4915, 32768, 768, default_on=("cuda",), dtype=torch.bfloat16),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    size = (case.sizes["M"], case.sizes["K"])
    mixture_logits = torch.randn(*size, generator=generator, device=device, dtype=case.dtype)
    seed = torch.tensor([SEED], device=device)
    inputs = linear_cross_entropy.make_inputs(case, device)
    return inputs | {"mixture_logits": mixture_logits.requires_grad_(), "seed": seed}


def exact(inputs: Inputs) -> Tensor:
    return linear_cross_entropy.exact(inputs) + gumbel_mix.exact(inputs).mean()


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """That of the losses. The sample is drawn from their logits, and at this temperature some tens of tokens a row are
    all that its gradient needs: no product more."""
    return linear_cross_entropy.work(case, pass_, graph_free)


def _logits_needs(case: Case) -> Work:
    """The logits of all heads, their log-softmax and its gradient, and five fp32 matrices for the mixture."""
    k, m, v, _ = (case.sizes[name] for name in "KMVd")
    return Work((k * (2 * case.dtype.itemsize + 12) + 20) * m * v, 0)


def _published(hidden_states: Tensor, mixture_logits: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = hidden_states @ weight.T
    losses = torch.stack([F.cross_entropy(one.float(), target) for one in logits])
    alpha = repdeg_fast.gradient_reversal(mixture_logits).softmax(dim=1)
    mixed = torch.einsum("mk,kmv->mv", alpha, logits.detach())
    return losses.mean() + embedded_sample(mixed, weight).mean()


def _arguments(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs["hidden_states"], inputs["mixture_logits"], inputs["weight"], inputs["target"]


def _losses(inputs: Inputs) -> Tensor:
    hidden_states, _, weight, target = _arguments(inputs)
    return repdeg_fast.multi_layer_mlm_loss(hidden_states, weight, target, strategy="chunked").mean()


def _separate(inputs: Inputs) -> Tensor:
    sampled = repdeg_fast.gumbel_mix(*_arguments(inputs)[:3], temperature=TEMPERATURE, seed=inputs["seed"])
    return _losses(inputs) + sampled[1].mean()


def _joint(inputs: Inputs) -> Tensor:
    options: dict[str, Any] = {"temperature": TEMPERATURE, "seed": inputs["seed"], "strategy": "chunked"}
    losses, _, embeddings = repdeg_fast.mlm_losses_and_sample(*_arguments(inputs), **options)
    return losses.mean() + embeddings.mean()


def _torchs(name: str, compile_: bool) -> Provider:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        function = compiled(_published) if compile_ else _published  # not before: the compiler is seconds of imports
        return lambda: function(*_arguments(inputs))

    return Provider(name, prepare, passes=(FORWARD_BACKWARD,), needs=_logits_needs, own_noise=True)


def _ours(name: str, call: Callable[[Inputs], Tensor]) -> list[Provider]:
    def operands(inputs: Inputs) -> list[Tensor]:
        return [inputs["hidden_states"], inputs["weight"]]

    return per_backend(operation, call, operands, name=name, named=("cpu", "triton"))


PROVIDERS = [
    Provider("losses-alone", lambda inputs: lambda: _losses(inputs), floor="a floor: ours, no sample"),
    _torchs("eager", compile_=False),
    _torchs("compile", compile_=True),
    *_ours("ours-separate", _separate),
    *_ours("ours-joint", _joint),
]

SUITE = Suite(
    op="mlm_losses_and_sample",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["V"],
    size_label="V",
    value_name="loss + embedding",
    case_of_weights=linear_cross_entropy.case_of_weights,
)
