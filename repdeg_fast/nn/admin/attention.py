"""What ``nn.MultiheadAttention`` computes, without its changes of layout.

Torch's module turns a (batch, sequence, d) input into (sequence, batch, d) and its output back. The turned input is a
copy, kept for the backward pass beside the input itself, which the residual block keeps; the turned output no row-wise
kernel can take as it lies. Here nothing moves: heads are strided views.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._checks import check_flag, check_floating, check_input
from repdeg_fast.ops.linear import linear


class ArgumentNames(NamedTuple):
    """What the arguments of :func:`attend` are called where a user passes them: errors say it so."""

    query: str = "query"
    memory: str = "memory"
    mask: str = "mask"
    key_padding_mask: str = "key_padding_mask"
    is_causal: str = "is_causal"


SOURCE = ArgumentNames("src", "src", "src_mask", "src_key_padding_mask")
TARGET = ArgumentNames("tgt", "tgt", "tgt_mask", "tgt_key_padding_mask", "tgt_is_causal")
MEMORY = ArgumentNames("tgt", "memory", "memory_mask", "memory_key_padding_mask", "memory_is_causal")


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,  # (B, L, d) if batch_first, else (L, B, d); or (L, d)
    memory: Tensor,  # like query, S for L
    mask: Tensor | None,  # (L, S) or (B·heads, L, S)
    key_padding_mask: Tensor | None,  # (B, S) or (S,)
    is_causal: bool,
    names: ArgumentNames = ArgumentNames(),  # noqa: B008 - a tuple
) -> Tensor:
    """``attention(query, memory, memory, …)[0]``, like ``query``, with torch's masks: in a bool one True stands for "do
    not look there", a float one is added to the scores. ``is_causal`` says that ``mask`` is the causal one.

    Raises:
        ValueError: shapes that do not agree, or ``is_causal`` without a mask.
        TypeError: a mask of integers.
    """
    _check_rows(attention, query, memory, names)
    _check_masks(attention, query, memory, mask, key_padding_mask, is_causal, names)
    queries, keys, values = (_heads(part, attention) for part in _project(attention, query, memory))
    plainly_causal = is_causal and key_padding_mask is None
    attended = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if plainly_causal else _merged(mask, key_padding_mask, queries),
        dropout_p=attention.dropout if attention.training else 0.0,
        is_causal=plainly_causal,
    )
    return project(attention.out_proj, _joined(attended, query, attention))


def check_plain(where: str, attention: nn.Module) -> None:
    """Whether :func:`attend` may stand for the module: torch's own, as torch's Transformer layers make it."""
    plain = type(attention) is nn.MultiheadAttention and attention.in_proj_weight is not None
    if not plain or attention.bias_k is not None or attention.add_zero_attn:
        raise TypeError(
            f"{where}: expected an nn.MultiheadAttention of one width, without add_bias_kv and add_zero_attn, got "
            f"{type(attention).__name__}; use repdeg_fast.AdminNorm in a layer of your own"
        )


def project(layer: nn.Module, rows: Tensor) -> Tensor:
    """``layer(rows)``, by products of our own where it is a linear layer and nothing else."""
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and not _is_hooked(layer):
        return linear(rows, layer.weight, layer.bias)
    return layer(rows)


def _is_hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or nn.modules.module._has_any_global_hook()


def _check_rows(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor, names: ArgumentNames) -> None:
    """What broadcasting and views would let pass, or scramble, comes to a clear end here."""
    d, layout = attention.embed_dim, "B, L" if attention.batch_first else "L, B"
    for name, rows in ((names.query, query), (names.memory, memory)):
        check_floating(name, rows)
        if rows.dim() not in (2, 3) or rows.shape[-1] != d:
            raise ValueError(f"{name}: expected shape ({layout}, {d}) or (L, {d}), got {tuple(rows.shape)}")
        check_input(name, rows, attention.in_proj_weight)
    batch_dim = 0 if attention.batch_first else 1
    if memory.dim() != query.dim() or (query.dim() == 3 and memory.shape[batch_dim] != query.shape[batch_dim]):
        raise ValueError(
            f"{names.memory}: expected the batch of {names.query} {tuple(query.shape)}, got {tuple(memory.shape)}"
        )


def _check_masks(
    attention: nn.MultiheadAttention,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    names: ArgumentNames,
) -> None:
    check_flag(names.is_causal, is_causal)
    if is_causal and mask is None:
        raise ValueError(f"{names.is_causal}: expected a {names.mask} with it, which it describes; got none")
    position_dim = 1 if attention.batch_first and query.dim() == 3 else 0
    batch = (memory.shape[1 - position_dim],) if memory.dim() == 3 else ()
    length, keys = query.shape[position_dim], memory.shape[position_dim]
    if mask is not None:
        _check_mask(names.mask, mask)
        plain, own = (length, keys), (math.prod(batch) * attention.num_heads, length, keys)
        if mask.shape not in (plain, own):
            given = tuple(mask.shape)
            raise ValueError(f"{names.mask}: expected shape {plain}, or {own} with one for each head, got {given}")
    if key_padding_mask is not None:
        _check_mask(names.key_padding_mask, key_padding_mask)
        if key_padding_mask.shape != (*batch, keys):
            raise ValueError(
                f"{names.key_padding_mask}: expected shape {(*batch, keys)}, a value for each sequence and position "
                f"of the keys, got {tuple(key_padding_mask.shape)}"
            )


def _check_mask(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool or a floating dtype, got {mask.dtype}")


def _project(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
    weight, bias, d = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    if query is memory:
        return linear(query, weight, bias).chunk(3, -1)
    own, other = (None, None) if bias is None else (bias[:d], bias[d:])
    return linear(query, weight[:d], own), *linear(memory, weight[d:], other).chunk(2, -1)


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


def _merged(mask: Tensor | None, key_padding_mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """Both masks in one that is added to the scores: broadcastable to (B, heads, L, S), in the dtype of the query."""
    batch, heads = queries.shape[:2]
    if mask is not None:
        mask = _additive(mask, queries.dtype)
        mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is None:
        return mask
    padding = _additive(key_padding_mask, queries.dtype).view(batch, 1, 1, -1)
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
