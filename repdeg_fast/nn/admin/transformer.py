"""``nn.Transformer`` and its parts with ADMIN's residual blocks (arXiv 2004.08249, section 4; arXiv 2008.07772).

Each class is torch's own, with torch's parameters under torch's names; only the end of a sub-layer differs. There
``norm(x + dropout(f(x)))`` becomes one :class:`~repdeg_fast.AdminNorm`, which adds ω to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._checks import (
    check_choice,
    check_dropout,
    check_dtype,
    check_flag,
    check_module,
    check_positive,
    check_size,
)
from repdeg_fast.nn.admin.attention import MEMORY, SOURCE, TARGET, attend, project
from repdeg_fast.nn.admin.norm import admin_norm_like

Activation = str | Callable[[Tensor], Tensor]


class AdminLayer(nn.Module):
    """What both layers are: torch's, with an AdminNorm at the end of each sub-layer."""

    self_attn: nn.MultiheadAttention
    linear1: nn.Linear

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_post_ln(norm_first)
        for name, size in (("d_model", d_model), ("nhead", nhead), ("dim_feedforward", dim_feedforward)):
            check_size(name, size)
        if d_model % nhead:
            raise ValueError(f"d_model: expected a multiple of nhead = {nhead}, got {d_model}")
        check_dropout("dropout", dropout)
        if not callable(activation):
            check_choice("activation", activation, ("relu", "gelu"))
        check_positive("layer_norm_eps", layer_norm_eps)
        for name, flag in (("batch_first", batch_first), ("bias", bias)):
            check_flag(name, flag)
        check_dtype("dtype", dtype)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        take_admin_norms(self)


class AdminEncoderLayer(AdminLayer, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer``, post-LN, with ADMIN's residual blocks: same constructor, ``forward`` and
    initial weights. Its parameters are torch's plus ``norm1.omega`` and ``norm2.omega`` (d_model,), which start at 1;
    see :func:`repdeg_fast.initialize_admin_`. ``norm_first=True`` is an error.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(S, d), (S, B, d), or (B, S, d) with ``batch_first``; arguments as in ``nn.TransformerEncoderLayer``."""
        x = self.norm1(src, attend(self.self_attn, src, src, src_mask, src_key_padding_mask, is_causal, SOURCE))
        return self.norm2(x, feed_forward(self, x))


class AdminDecoderLayer(AdminLayer, nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, post-LN, with ADMIN's residual blocks; see :class:`AdminEncoderLayer`."""

    multihead_attn: nn.MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(T, d), (T, B, d), or (B, T, d) with ``batch_first``; arguments as in ``nn.TransformerDecoderLayer``."""
        x = self.norm1(tgt, attend(self.self_attn, tgt, tgt, tgt_mask, tgt_key_padding_mask, tgt_is_causal, TARGET))
        seen = attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal, MEMORY)
        x = self.norm2(x, seen)
        return self.norm3(x, feed_forward(self, x))

    # torch's own puts ReLU in the place of an activation that is a module when a decoder layer is copied
    __setstate__ = nn.Module.__setstate__


class AdminEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` of ``num_layers`` copies of an :class:`AdminEncoderLayer`.

    Padded positions come out as the layers make them; torch's nested-tensor inference, which sets them to zero, is off.
    """

    def __init__(self, encoder_layer: AdminEncoderLayer, num_layers: int, norm: nn.Module | None = None) -> None:
        _check_layers("encoder_layer", encoder_layer, AdminEncoderLayer, num_layers, norm)
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False)


class AdminDecoder(nn.TransformerDecoder):
    """``nn.TransformerDecoder`` of ``num_layers`` copies of an :class:`AdminDecoderLayer`."""

    def __init__(self, decoder_layer: AdminDecoderLayer, num_layers: int, norm: nn.Module | None = None) -> None:
        _check_layers("decoder_layer", decoder_layer, AdminDecoderLayer, num_layers, norm)
        super().__init__(decoder_layer, num_layers, norm)


class AdminTransformer(nn.Transformer):
    """``nn.Transformer``, post-LN, with ADMIN's residual blocks: same constructor, ``forward`` and initial weights.

    A custom encoder or decoder is taken as it is. ``norm_first=True`` is an error.

    Example::

        model = AdminTransformer(512, 8, num_encoder_layers=60, num_decoder_layers=12, batch_first=True)
        initialize_admin_(model, batch=(source, target))
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("num_encoder_layers", num_encoder_layers)
        check_size("num_decoder_layers", num_decoder_layers)
        for name, custom in (("custom_encoder", custom_encoder), ("custom_decoder", custom_decoder)):
            if custom is not None:
                check_module(name, custom)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first)
        encoder, decoder = custom_encoder, custom_decoder
        if encoder is None:
            encoder_layer = AdminEncoderLayer(*layer, **factory)
            encoder = AdminEncoder(encoder_layer, num_encoder_layers, nn.LayerNorm(d_model, layer_norm_eps, **factory))
        if decoder is None:
            decoder_layer = AdminDecoderLayer(*layer, **factory)
            decoder = AdminDecoder(decoder_layer, num_decoder_layers, nn.LayerNorm(d_model, layer_norm_eps, **factory))
        super().__init__(
            d_model, nhead, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first
        )  # which also draws the weights


def take_admin_norms(layer: nn.Module) -> None:
    """Put one AdminNorm in the place of each sub-layer's dropout and LayerNorm."""
    for number in sublayers(layer):
        norm, dropout = getattr(layer, f"norm{number}"), getattr(layer, f"dropout{number}")
        setattr(layer, f"norm{number}", admin_norm_like(norm, dropout.p))
        delattr(layer, f"dropout{number}")
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # keeps nn.TransformerEncoder's nested tensors away: AdminNorm takes none


def check_weights(where: str, layer: nn.Module) -> None:
    """Whether all are parameters: what is written to a weight that a parametrization or a hook computes is lost."""
    for name, part in layer.named_modules(prefix=where):
        for weight in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
            if isinstance(value := getattr(part, weight, None), Tensor) and not isinstance(value, nn.Parameter):
                raise ValueError(
                    f"model: expected a parameter, got {f'{name}.{weight}'.lstrip('.')} that is computed from others; "
                    f"make it one by torch.nn.utils.parametrize.remove_parametrizations, prune.remove or the like"
                )


def feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor) -> Tensor:
    """The last sub-layer's branch."""
    return project(layer.linear2, layer.dropout(layer.activation(project(layer.linear1, x))))


def sublayers(layer: nn.Module) -> range:
    """The numbers of the layer's norms, in the order of execution."""
    return range(1, 4 if isinstance(layer, nn.TransformerDecoderLayer) else 3)


def check_post_ln(norm_first: bool, where: str = "") -> None:
    check_flag(f"{where + ': ' if where else ''}norm_first", norm_first)
    if norm_first:
        raise ValueError(
            f"{where + ': ' if where else ''}norm_first: expected False, got True; ADMIN scales the residual stream of "
            f"post-LN layers, pre-LN layers need no such help"
        )


def _check_layers(name: str, layer: Any, expected: type[nn.Module], number: int, norm: nn.Module | None) -> None:
    if not isinstance(layer, expected):
        raise TypeError(
            f"{name}: expected a repdeg_fast.nn.{expected.__name__}, got {type(layer).__name__}; "
            f"repdeg_fast.nn.from_torch converts torch's"
        )
    check_size("num_layers", number)
    if norm is not None:
        check_module("norm", norm)
