"""Gumbel mixing: arguments checked, then handed to :mod:`repdeg_fast.ops.gumbel_mix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from repdeg_fast import backends
from repdeg_fast._checks import (
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_positive,
    is_cut,
    row_of_padding,
)
from repdeg_fast._seeds import seed_tensor
from repdeg_fast.ops import gumbel_mix as _gumbel_mix

if TYPE_CHECKING:
    from repdeg_fast.distributed import VocabularyShard


def gumbel_mix(
    hidden_states: Tensor,  # (K, M, d)
    mixture_logits: Tensor | None,  # (M, K)
    weight: Tensor,  # (V, d)
    bias: Tensor | None = None,  # (V,)
    embedding: Tensor | None = None,  # (V, d_f)
    *,
    temperature: float = 0.3,
    hard: bool = True,
    gradient_scale: float = -1.0,
    seed: int | Tensor | None = None,
    padding_idx: int | None = None,
    first_position: int = 0,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a token from a mixture of K language-model heads, with a gradient for the mixture (AMOS, arXiv
    2204.03243, section 3).

    z = Σ_k α_k (weight h^(k) + bias) with α = softmax(mixture_logits); the token is argmax(z + Gumbel noise), an exact
    sample of softmax(z), and its embedding the value. Backward takes the straight-through Gumbel-softmax gradient into
    ``mixture_logits``, times ``gradient_scale``, and the plain one into ``embedding``; ``hidden_states``, and
    ``weight`` and ``bias`` in their part as a language-model head, get none. Never stores a row of logits: saves one
    token and one number a row.

    Args:
        hidden_states: (K, M, d), the inputs of the K heads, float32, float64, bfloat16 or float16, any strides.
        mixture_logits: (M, K); ``None`` where K = 1: plain sampling.
        weight: (V, d), the heads' shared projection; multiplied in the dtype of ``hidden_states``.
        bias: (V,). A bias of −∞ excludes a token.
        embedding: (V, d_f), where the value comes from; ``weight`` unless given (which then gets its gradient).
        temperature: τ, of the gradient and of the soft value; the sample does not depend on it.
        hard: the value is the token's embedding; else Σ_v y_v embedding[v] with y = softmax((z + noise)/τ).
        gradient_scale: −1 makes the mixture work against what follows (AMOS), 1 with it.
        seed: an int, a one-element int64 tensor on the device (which a CUDA graph can change between replays), or
            ``None`` to draw one from torch's generator. Equal seeds give equal tokens on every backend, up to ties
            within rounding.
        padding_idx: a row of ``embedding`` that gets no gradient, as in ``nn.Embedding``; it is sampled like others.
        first_position: the first row's number in a larger batch, whose noise these rows then get: what ranks that share
            a batch draw is what one process draws.
        shard: ``weight``, ``bias`` and ``embedding`` are the rows that this rank has of a vocabulary cut over ranks,
            which have all else whole, the seed too. Not needed where they are DTensors with ``Shard(0)``.

    Returns:
        Token ids (M,), int64, and embeddings (M, d_f) in the dtype of ``embedding``. Where a row has a NaN or +∞
        logit, or all −∞, its token is arbitrary (in range) and its embedding NaN.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    embedding = weight if embedding is None else embedding
    check_sampling(temperature, gradient_scale, first_position)
    check_flag("hard", hard)
    if is_cut(weight, shard):
        from repdeg_fast.distributed import gumbel_mix as over_shards

        sampling = over_shards.Sampling(seed, float(temperature), first_position, hard, float(gradient_scale))
        heads = (hidden_states, mixture_logits, weight, bias, embedding)
        return over_shards.gumbel_mix(*heads, sampling, padding_idx, shard, backends.requested())
    check_head(hidden_states, mixture_logits, weight, bias, embedding)
    values, token_ids, _ = _gumbel_mix.gumbel_mix(
        hidden_states.detach(), mixture_logits, weight.detach(), detached(bias), embedding,
        seed_tensor(seed, hidden_states.device), float(temperature), first_position, hard, float(gradient_scale),
        row_of_padding(padding_idx, len(weight)), backends.requested(),
    )  # fmt: skip
    return token_ids, values


def gradient_reversal(x: Tensor, scale: float = -1.0) -> Tensor:
    """``x`` as it is; its gradient is multiplied by ``scale`` (arXiv 1409.7495, where it is −λ)."""
    check_floating("x", x)
    check_finite("scale", scale)
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError("gradient_reversal has no forward-mode derivative: only its gradient is not the identity's")
    return _GradientReversal.apply(x, scale)


class _GradientReversal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.scale = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def check_sampling(temperature: float, gradient_scale: float, first_position: int) -> None:
    check_positive("temperature", temperature)
    check_finite("gradient_scale", gradient_scale)
    check_integer("first_position", first_position)
    if first_position < 0:
        raise ValueError(f"first_position: expected 0 or more, got {first_position}")


def check_head(
    hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None, embedding: Tensor
) -> None:
    for name, value in (("hidden_states", hidden_states), ("weight", weight), ("embedding", embedding)):
        check_floating(name, value)
    if hidden_states.dim() != 3 or 0 in (hidden_states.shape[0], hidden_states.shape[2]):
        raise ValueError(
            f"hidden_states: expected shape (K, M, d), K and d at least 1, got {tuple(hidden_states.shape)}"
        )
    heads, rows, width = hidden_states.shape
    if weight.dim() != 2 or weight.shape[1] != width or len(weight) == 0:
        raise ValueError(f"weight: expected shape (V, {width}) like hidden_states, got {tuple(weight.shape)}")
    if embedding.dim() != 2 or len(embedding) != len(weight) or embedding.shape[1] == 0:
        raise ValueError(f"embedding: expected shape ({len(weight)}, d_f) like weight, got {tuple(embedding.shape)}")
    if mixture_logits is not None:
        _check_shape("mixture_logits", mixture_logits, (rows, heads), "(M, K) like hidden_states")
    elif heads != 1:
        raise ValueError(f"mixture_logits: expected shape ({rows}, {heads}), got None, which needs K = 1")
    if bias is not None:
        _check_shape("bias", bias, (len(weight),), "one value a row of weight")
    wide = [tensor.dtype == torch.float64 for tensor in (hidden_states, weight, embedding)]
    if any(wide) != all(wide):
        dtypes = f"{hidden_states.dtype}, {weight.dtype} and {embedding.dtype}"
        raise TypeError(f"hidden_states, weight and embedding: expected all or none in float64, got {dtypes}")
    others = {"weight": weight, "embedding": embedding, "bias": bias, "mixture_logits": mixture_logits}
    for name, other in others.items():
        if other is not None and other.device != hidden_states.device:
            raise ValueError(f"{name}: expected device {hidden_states.device} like hidden_states, got {other.device}")


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    check_floating(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, {meaning}, got {tuple(value.shape)}")
