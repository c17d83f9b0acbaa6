"""Any model's ``nn.Transformer*`` layers as ADMIN's."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from repdeg_fast._checks import check_module
from repdeg_fast.nn.admin.attention import check_plain
from repdeg_fast.nn.admin.sharding import check_whole
from repdeg_fast.nn.admin.transformer import (
    AdminDecoder,
    AdminDecoderLayer,
    AdminEncoder,
    AdminEncoderLayer,
    AdminLayer,
    AdminTransformer,
    check_post_ln,
    sublayers,
    take_admin_norms,
)

Module = TypeVar("Module", bound=nn.Module)

ADMIN_CLASS = {
    nn.TransformerEncoderLayer: AdminEncoderLayer,
    nn.TransformerDecoderLayer: AdminDecoderLayer,
    nn.TransformerEncoder: AdminEncoder,
    nn.TransformerDecoder: AdminDecoder,
    nn.Transformer: AdminTransformer,
}
TORCH_CLASS = {admin: torch_class for torch_class, admin in ADMIN_CLASS.items()}
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def from_torch(module: Module) -> Module:
    """A copy of ``module`` in which every ``nn.Transformer``, its stacks and its layers are ADMIN's, with ω = 1.

    Outputs and gradients are those of the original (dropout masks differ; at padded positions torch's nested-tensor
    inference gives zeros, this does not). ``module`` is any model that contains post-LN ``nn.Transformer*`` layers.

    Raises:
        ValueError: no layer to convert, or a pre-LN one (``norm_first=True``).
        TypeError: no module, a subclass of torch's layers, whose ``forward`` may be another, or parts in a layer that
            are not those it is made with.
    """
    check_module("module", module)
    check_whole("module", module, "convert it before you call fully_shard or parallelize_module")
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
    parts = [(name, part) for name, part in module.named_modules() if not isinstance(part, AdminLayer)]
    layers = [(name, part) for name, part in parts if isinstance(part, _TORCH_LAYERS)]
    for name, layer in layers:
        _check_convertible(f"module{'.' if name else ''}{name}", layer)
    for _, part in parts:
        if type(part) in ADMIN_CLASS:
            part.__class__ = ADMIN_CLASS[type(part)]
        if isinstance(part, AdminLayer):
            take_admin_norms(part)
        if isinstance(part, AdminEncoder):
            part.use_nested_tensor = False
    return len(layers)


def _check_convertible(where: str, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    if type(layer) not in ADMIN_CLASS:
        raise TypeError(
            f"{where}: expected torch's own layer, got its subclass {type(layer).__name__}, whose forward may be "
            f"another; use repdeg_fast.AdminNorm in it instead"
        )
    check_post_ln(layer.norm_first, where)
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
