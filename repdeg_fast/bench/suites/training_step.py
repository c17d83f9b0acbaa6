"""A whole step of AMOS, forward and backward without the optimizer: the model of ``models/amos`` with the heads of
published code (K tensors of logits, mixed and sampled), in eager PyTorch and compiled, and as it is.

The case's dtype is that of autocast; parameters are in float32. Dropout is 0, so that the loss can be compared; the
published heads draw noise of their own and are not. Needs transformers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.backends import use_backend
from repdeg_fast.bench.suite import FORWARD, Case, Inputs, Provider, Suite, Work
from repdeg_fast.bench.suites.gumbel_mix import SEED, embedded_sample
from repdeg_fast.ops.linear_cross_entropy import operation

_HEAD_WIDTH, _WIDENING = 64, 4  # of attention; of the feed-forward part in units of d
_MASKED = 0.15
_MASK_TOKEN = 103
_PLAIN = ("input_ids", "labels", "autocast", "mlm_layers")  # inputs that are no parameters


def _case(name: str, batch: int, length: int, width: int, layers: int, vocabulary: int, **options: Any) -> Case:
    sizes = {"B": batch, "S": length, "d": width, "layers": layers, "V": vocabulary, "K": 3}
    missing = None if importlib.util.find_spec("transformers") else "transformers is not installed"
    return Case(name, sizes, tokens=batch * length, unavailable=missing, **options)


CASES = [
    _case("amos-base", 64, 512, 768, 12, 32768, dtype=torch.bfloat16, default_on=("cuda",)),
    _case("small", 8, 64, 128, 6, 30522, default_on=()),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random tokens, 15 % of them masked, and the parameters by name: all providers train the same tensors."""
    torch.manual_seed(0)
    layers = case.sizes["layers"]
    heads = torch.tensor([layers // 3, layers // 2, layers * 2 // 3])  # 4, 6, 8 of 12
    model = _model(case.sizes, heads, published=False).to(device)
    shape = (case.sizes["B"], case.sizes["S"])
    tokens = torch.randint(_MASK_TOKEN + 1, case.sizes["V"], shape, device=device)
    masked = torch.zeros(shape, dtype=torch.bool, device=device)
    masked[:, : round(_MASKED * shape[1])] = True  # where they are does not matter
    return {
        "input_ids": tokens.masked_fill(masked, _MASK_TOKEN),
        "labels": tokens.masked_fill(~masked, -100),
        "autocast": torch.empty(0, dtype=case.dtype),
        "mlm_layers": heads,
        **dict(model.named_parameters()),
    }


def _model(sizes: dict[str, int], mlm_layers: Tensor, published: bool) -> Any:
    from repdeg_fast.models.amos import AmosConfig, AmosForPreTraining

    width = sizes["d"]
    config = AmosConfig(
        vocab_size=sizes["V"], hidden_size=width, num_hidden_layers=sizes["layers"],
        num_attention_heads=max(1, width // _HEAD_WIDTH), intermediate_size=_WIDENING * width,
        max_position_embeddings=sizes["S"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        mlm_layers=tuple(mlm_layers.tolist()),
    )  # fmt: skip
    return (_published_class() if published else AmosForPreTraining)(config)


@functools.cache
def _published_class() -> type:
    from repdeg_fast.models.amos import AmosForPreTraining

    class PublishedHeads(AmosForPreTraining):
        """K tensors of logits, for the losses and, detached, for the mixture."""

        def _generate(
            self, features: Tensor, target: Tensor, seed: Any, first_position: int
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            head = self.mlm_head
            logits = F.linear(head.transform(features), head.weight, head.bias)
            losses = torch.stack([F.cross_entropy(one.float(), target) for one in logits])
            alpha = repdeg_fast.gradient_reversal(self._mixture_logits(features)).softmax(dim=1)
            mixed = torch.einsum("mk,kmv->mv", alpha.to(logits.dtype), logits.detach())
            embeddings = embedded_sample(mixed, head.weight)
            tokens = embeddings.new_zeros(len(target), dtype=torch.int64)  # told apart by nobody here: all replaced
            return losses, alpha.detach().float().mean(dim=0), tokens, embeddings

    return PublishedHeads


def _module(inputs: Inputs, published: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A model around the parameters that ``inputs`` holds."""
    positions = inputs["discriminator.embeddings.position_embeddings.weight"]
    words = inputs["discriminator.embeddings.word_embeddings.weight"]
    layers = sum(name.startswith("discriminator") and name.endswith("output.dense.weight") for name in inputs) // 2
    sizes = {"V": len(words), "d": words.shape[1], "layers": layers, "S": len(positions)}
    model = _model(sizes, inputs["mlm_layers"], published).to(words.device)
    parameters = {name: inputs[name] for name, _ in model.named_parameters()}
    if dtype != torch.float32:
        parameters = {name: parameter.detach().to(dtype) for name, parameter in parameters.items()}
    model.load_state_dict(parameters, strict=False, assign=True)
    model.generator.embeddings.word_embeddings.weight = model.discriminator.embeddings.word_embeddings.weight
    return model


def _loss(model: Any, inputs: Inputs) -> Tensor:
    words, dtype = inputs["input_ids"], inputs["autocast"].dtype
    with torch.autocast(words.device.type, dtype, enabled=dtype != torch.float32):
        return model(words, labels=inputs["labels"], seed=SEED).loss


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    plain = {**inputs, "autocast": torch.empty(0)}
    with use_backend("reference"):
        return _loss(_module(inputs, published=False, dtype=torch.float64), plain)


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """Bytes: every weight read once, and its gradient written once. Operations: two a weight and token in the layers
    of generator and discriminator and in the K heads, attention's products, and the mixed logits made twice; backward
    twice the forward pass of all but these."""
    batch, length, width, layers, vocabulary, heads = (case.sizes[name] for name in ("B", "S", "d", "layers", "V", "K"))
    tokens, run = batch * length, layers + layers * 2 // 3
    masked = batch * round(_MASKED * length)
    layer_weights = (4 + 2 * _WIDENING) * width**2
    weights = run * layer_weights + vocabulary * width
    flops = 2 * tokens * run * (layer_weights + 2 * length * width) + 2 * heads * masked * vocabulary * width
    if pass_ == FORWARD:
        return Work(4 * weights, flops)
    return Work(12 * weights, 3 * flops + 2 * masked * vocabulary * width)


def _logits_needs(case: Case) -> Work:
    """The logits of all heads in fp32, their log-softmax and its gradient, and five more for the mixture."""
    masked = case.sizes["B"] * round(_MASKED * case.sizes["S"])
    return Work((3 * case.sizes["K"] + 5) * 4 * masked * case.sizes["V"], 0)


def _published(inputs: Inputs, compile_: bool = False) -> Callable[[], Tensor]:
    model = _module(inputs, published=True)
    run = torch.compile(model, dynamic=False) if compile_ else model
    return lambda: _loss(run, inputs)


def _ours(backend: str) -> Provider:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        model = _module(inputs, published=False)

        def run() -> Tensor:
            with use_backend(backend):
                return _loss(model, inputs)

        return run

    def unavailable(inputs: Inputs) -> str | None:
        words = inputs["discriminator.embeddings.word_embeddings.weight"]
        return operation.unavailable(backend, words.device.type, words, words)

    return Provider(f"ours-{backend}", prepare, ours=True, unavailable=unavailable)


def _case_of_weights(name: str, weight: Tensor) -> Case:
    """An encoder around an embedding, which is all that one matrix says about it."""
    return _case(name, 8, 64, weight.shape[1], 6, weight.shape[0])


SUITE = Suite(
    op="training_step",
    cases=CASES,
    providers=[
        Provider("eager", _published, needs=_logits_needs, own_noise=True),
        Provider("compile", lambda inputs: _published(inputs, compile_=True), needs=_logits_needs, own_noise=True),
        *map(_ours, ("cpu", "triton")),
    ],
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.tokens or 0,
    size_label="tokens",
    value_name="loss",
    case_of_weights=_case_of_weights,
)
