"""``nn.Transformer`` and its parts with ADMIN's residual blocks (arXiv 2004.08249, section 4; arXiv 2008.07772).

Each class is torch's own, with torch's parameters under torch's names; only the end of a sub-layer differs. There
``norm(x + dropout(f(x)))`` becomes one :class:`~repdeg_fast.AdminNorm`, which adds ω to the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast.nn.admin_norm import AdminNorm
from repdeg_fast.nn.attention import attend, check_plain

Module = TypeVar("Module", bound=nn.Module)
Activation = str | Callable[[Tensor], Tensor]


def admin_norm_like(layer_norm: nn.LayerNorm, dropout: float = 0.0) -> AdminNorm:
    """An AdminNorm that takes the place of ``layer_norm(x + dropout(branch))``, with ω = 1 and the same parameters.

    ``weight`` and ``bias`` are shared with ``layer_norm``, not copied: an optimizer that holds them stays valid.
    """
    if not isinstance(layer_norm, nn.LayerNorm):
        raise TypeError(f"layer_norm: expected an nn.LayerNorm, got {type(layer_norm).__name__}")
    if len(layer_norm.normalized_shape) != 1:
        raise ValueError(
            f"layer_norm: expected one over the last dimension, got normalized_shape {layer_norm.normalized_shape}"
        )
    weight, bias = layer_norm.weight, layer_norm.bias
    norm = AdminNorm(
        layer_norm.normalized_shape[0],
        dropout=dropout,
        eps=layer_norm.eps,
        elementwise_affine=weight is not None,
        bias=bias is not None,
        device=None if weight is None else weight.device,
        dtype=None if weight is None else weight.dtype,
    )
    norm.weight, norm.bias = weight, bias
    return norm.train(layer_norm.training)


class AdminEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer``, post-LN, with ADMIN's residual blocks: same constructor, ``forward`` and
    initial weights. Its parameters are torch's plus ``norm1.omega`` and ``norm2.omega`` (d_model,), which start at 1;
    see :func:`repdeg_fast.initialize_admin_`. ``norm_first=True`` is an error.
    """

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
        _check_post_ln(norm_first)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _take_admin_norms(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(S, d), (S, B, d), or (B, S, d) with ``batch_first``; arguments as in ``nn.TransformerEncoderLayer``."""
        x = self.norm1(src, attend(self.self_attn, src, src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x, feed_forward(self, x))


class AdminDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, post-LN, with ADMIN's residual blocks; see :class:`AdminEncoderLayer`."""

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
        _check_post_ln(norm_first)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _take_admin_norms(self)

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
        x = self.norm1(tgt, attend(self.self_attn, tgt, tgt, tgt_mask, tgt_key_padding_mask, tgt_is_causal))
        seen = attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        x = self.norm2(x, seen)
        return self.norm3(x, feed_forward(self, x))

    # torch's own puts ReLU in the place of an activation that is a module when a decoder layer is copied
    __setstate__ = nn.Module.__setstate__


class AdminEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` of ``num_layers`` copies of an :class:`AdminEncoderLayer`.

    Padded positions come out as the layers make them; torch's nested-tensor inference, which sets them to zero, is off.
    """

    def __init__(self, encoder_layer: AdminEncoderLayer, num_layers: int, norm: nn.Module | None = None) -> None:
        _check_layer("encoder_layer", encoder_layer, AdminEncoderLayer)
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False)


class AdminDecoder(nn.TransformerDecoder):
    """``nn.TransformerDecoder`` of ``num_layers`` copies of an :class:`AdminDecoderLayer`."""

    def __init__(self, decoder_layer: AdminDecoderLayer, num_layers: int, norm: nn.Module | None = None) -> None:
        _check_layer("decoder_layer", decoder_layer, AdminDecoderLayer)
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
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first)
        encoder, decoder = custom_encoder, custom_decoder
        if encoder is None:
            norm = nn.LayerNorm(d_model, layer_norm_eps, **factory)
            encoder = AdminEncoder(AdminEncoderLayer(*layer, **factory), num_encoder_layers, norm)
        if decoder is None:
            norm = nn.LayerNorm(d_model, layer_norm_eps, **factory)
            decoder = AdminDecoder(AdminDecoderLayer(*layer, **factory), num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first
        )  # which also draws the weights


ADMIN_CLASS = {
    nn.TransformerEncoderLayer: AdminEncoderLayer,
    nn.TransformerDecoderLayer: AdminDecoderLayer,
    nn.TransformerEncoder: AdminEncoder,
    nn.TransformerDecoder: AdminDecoder,
    nn.Transformer: AdminTransformer,
}
TORCH_CLASS = {admin: torch_class for torch_class, admin in ADMIN_CLASS.items()}
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_ADMIN_LAYERS = (AdminEncoderLayer, AdminDecoderLayer)


def from_torch(module: Module) -> Module:
    """A copy of ``module`` in which every ``nn.Transformer``, its stacks and its layers are ADMIN's, with ω = 1.

    Outputs and gradients are those of the original (dropout masks differ; at padded positions torch's nested-tensor
    inference gives zeros, this does not). ``module`` is any model that contains post-LN ``nn.Transformer*`` layers.

    Raises:
        ValueError: no layer to convert, or a pre-LN one (``norm_first=True``).
        TypeError: a subclass of torch's layers, whose ``forward`` may be another, or parts in a layer that are not
            those it is made with.
    """
    converted = copy.deepcopy(module)
    for original, part in zip(module.modules(), converted.modules(), strict=True):
        if isinstance(part, nn.TransformerDecoderLayer) and "activation" not in vars(original):
            vars(part).pop("activation", None)  # ReLU in the place of a module: see AdminDecoderLayer.__setstate__
    if not _convert_(converted):
        raise ValueError(
            f"module: expected nn.TransformerEncoderLayer or nn.TransformerDecoderLayer in it, "
            f"got {type(module).__name__} without; use repdeg_fast.AdminNorm in layers of your own"
        )
    return converted


def _convert_(module: nn.Module) -> int:
    """Turn torch's Transformer classes in ``module`` into ADMIN's, in place; returns the number of layers turned.

    Objects change class, as in torch's own ``parametrize`` and ``fully_shard``: what hangs on them (``requires_grad``,
    ties between parameters, parametrizations) stays.
    """
    parts = [(name, part) for name, part in module.named_modules() if not isinstance(part, _ADMIN_LAYERS)]
    layers = [(name, part) for name, part in parts if isinstance(part, _TORCH_LAYERS)]
    for name, layer in layers:
        _check_convertible(f"module{'.' if name else ''}{name}", layer)
    for _, part in parts:
        if type(part) in ADMIN_CLASS:
            part.__class__ = ADMIN_CLASS[type(part)]
        if isinstance(part, _ADMIN_LAYERS):
            _take_admin_norms(part)
        if isinstance(part, AdminEncoder):
            part.use_nested_tensor = False
    return len(layers)


def _check_convertible(where: str, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    if type(layer) not in ADMIN_CLASS:
        raise TypeError(
            f"{where}: expected torch's own layer, got its subclass {type(layer).__name__}, whose forward may be "
            f"another; use repdeg_fast.AdminNorm in it instead"
        )
    _check_post_ln(layer.norm_first, where)
    for child, part in layer.named_children():
        if child.endswith("_attn"):
            check_plain(f"{where}.{child}", part)
    for number in sublayers(layer):
        for child, expected in ((f"norm{number}", nn.LayerNorm), (f"dropout{number}", nn.Dropout)):
            if type(part := getattr(layer, child)) is not expected:
                raise TypeError(
                    f"{where}.{child}: expected an nn.{expected.__name__}, whose place an AdminNorm takes, got "
                    f"{type(part).__name__}; use repdeg_fast.AdminNorm in a layer of your own"
                )


def _take_admin_norms(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
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
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


def sublayers(layer: nn.Module) -> range:
    """The numbers of the layer's norms, in the order of execution."""
    return range(1, 4 if isinstance(layer, nn.TransformerDecoderLayer) else 3)


def _check_post_ln(norm_first: bool, where: str = "") -> None:
    if norm_first:
        raise ValueError(
            f"{where + ': ' if where else ''}norm_first: expected False, got True; ADMIN scales the residual stream of "
            f"post-LN layers, pre-LN layers need no such help"
        )


def _check_layer(name: str, layer: Any, expected: type[nn.Module]) -> None:
    if not isinstance(layer, expected):
        raise TypeError(
            f"{name}: expected a repdeg_fast.nn.{expected.__name__}, got {type(layer).__name__}; "
            f"repdeg_fast.nn.from_torch converts torch's"
        )
