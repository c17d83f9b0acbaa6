"""What ``nn.MultiheadAttention`` computes, without its changes of layout.

Torch's module turns a (batch, sequence, d) input into (sequence, batch, d) and its output back. The turned input is a
copy, kept for the backward pass beside the input itself, which the residual block keeps; the turned output no row-wise
kernel can take as it lies. Here nothing moves: heads are strided views.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._checks import check_floating


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,  # (B, L, d) if batch_first, else (L, B, d); or (L, d)
    memory: Tensor,  # like query, S for L
    mask: Tensor | None,  # (L, S) or (B·heads, L, S)
    key_padding_mask: Tensor | None,  # (B, S) or (S,)
    is_causal: bool,
) -> Tensor:
    """``attention(query, memory, memory, …)[0]``, like ``query``, with torch's masks: in a bool one True stands for "do
    not look there", a float one is added to the scores. ``is_causal`` says that ``mask`` is the causal one.

    Raises:
        ValueError: shapes that do not agree, or ``is_causal`` without a mask.
        TypeError: a mask of integers.
    """
    _check_shapes(attention, query, memory, key_padding_mask)
    if is_causal and mask is None:
        raise ValueError("is_causal: expected a mask with it, which it describes; got none")
    queries, keys, values = (_heads(part, attention) for part in _project(attention, query, memory))
    plainly_causal = is_causal and key_padding_mask is None
    attended = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if plainly_causal else _merged(mask, key_padding_mask, queries, keys),
        dropout_p=attention.dropout if attention.training else 0.0,
        is_causal=plainly_causal,
    )
    return attention.out_proj(_joined(attended, query, attention))


def check_plain(where: str, attention: nn.Module) -> None:
    """Whether :func:`attend` may stand for the module: torch's own, as torch's Transformer layers make it."""
    plain = type(attention) is nn.MultiheadAttention and attention.in_proj_weight is not None
    if not plain or attention.bias_k is not None or attention.add_zero_attn:
        raise TypeError(
            f"{where}: expected an nn.MultiheadAttention of one width, without add_bias_kv and add_zero_attn, got "
            f"{type(attention).__name__}; use repdeg_fast.AdminNorm in a layer of your own"
        )


def _check_shapes(
    attention: nn.MultiheadAttention, query: Tensor, memory: Tensor, key_padding_mask: Tensor | None
) -> None:
    """What broadcasting and views would let pass, or scramble, comes to a clear end here."""
    d, layout = attention.embed_dim, "B, L" if attention.batch_first else "L, B"
    for name, rows in (("query", query), ("memory", memory)):
        check_floating(name, rows)
        if rows.dim() not in (2, 3) or rows.shape[-1] != d:
            raise ValueError(f"{name}: expected shape ({layout}, {d}) or (L, {d}), got {tuple(rows.shape)}")
    batch_dim = 0 if attention.batch_first else 1
    if memory.dim() != query.dim() or (query.dim() == 3 and memory.shape[batch_dim] != query.shape[batch_dim]):
        raise ValueError(f"memory: expected the batch of a query {tuple(query.shape)}, got {tuple(memory.shape)}")
    if key_padding_mask is not None:
        expected = memory.shape[:1] if memory.dim() == 2 else (memory.shape[batch_dim], memory.shape[1 - batch_dim])
        if key_padding_mask.shape != expected:
            raise ValueError(
                f"key_padding_mask: expected shape {tuple(expected)}, a value for each sequence and position of the "
                f"keys, got {tuple(key_padding_mask.shape)}"
            )


def _project(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
    weight, bias, d = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    if query is memory:
        return F.linear(query, weight, bias).chunk(3, -1)
    own, other = (None, None) if bias is None else (bias[:d], bias[d:])
    return F.linear(query, weight[:d], own), *F.linear(memory, weight[d:], other).chunk(2, -1)


def _heads(rows: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """(B, heads, L, d / heads), a view."""
    heads = rows.unflatten(-1, (attention.num_heads, attention.head_dim))
    if heads.dim() == 3:
        return heads.transpose(0, 1)[None]
    return heads.transpose(1, 2) if attention.batch_first else heads.permute(1, 2, 0, 3)


def _joined(attended: Tensor, query: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """From (B, heads, L, d / heads) to the shape of ``query``; a view, for attention writes its output as q lies."""
    if query.dim() == 2:
        return attended[0].transpose(0, 1).flatten(-2)
    return (attended.transpose(1, 2) if attention.batch_first else attended.permute(2, 0, 1, 3)).flatten(-2)


def _merged(mask: Tensor | None, key_padding_mask: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
    """Both masks in one that is added to the scores: broadcastable to (B, heads, L, S), in the dtype of the query."""
    batch, heads, length = queries.shape[:3]
    if mask is not None:
        plain, own = (length, keys.shape[2]), (batch * heads, length, keys.shape[2])
        if mask.shape not in (plain, own):
            raise ValueError(f"mask: expected shape {plain}, or {own} with one for each head, got {tuple(mask.shape)}")
        mask = _additive("mask", mask, queries.dtype)
        mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is None:
        return mask
    padding = _additive("key_padding_mask", key_padding_mask, queries.dtype).view(batch, 1, 1, -1)
    return padding if mask is None else mask + padding


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool or a floating dtype, got {mask.dtype}")
    return mask.to(dtype)
