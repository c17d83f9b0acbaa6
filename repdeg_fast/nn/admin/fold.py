"""A trained ADMIN model as plain ``nn.Transformer*`` modules, with equal outputs."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._checks import check_module
from repdeg_fast.nn.admin.convert import TORCH_CLASS
from repdeg_fast.nn.admin.norm import AdminNorm
from repdeg_fast.nn.admin.profile import admin_norms
from repdeg_fast.nn.admin.sharding import check_whole
from repdeg_fast.nn.admin.transformer import AdminDecoderLayer, AdminEncoderLayer, AdminLayer, check_weights, sublayers


class ScaledInputEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` of ``src ⊙ input_scale``: the first of a folded stack, which no norm precedes."""

    input_scale: nn.Parameter

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return super().forward(src * self.input_scale, src_mask, src_key_padding_mask, is_causal)


class ScaledInputDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer`` of ``tgt ⊙ input_scale``: the first of a folded stack, which no norm precedes."""

    input_scale: nn.Parameter

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
        return super().forward(
            tgt * self.input_scale, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            tgt_is_causal, memory_is_causal,
        )  # fmt: skip


_SCALED: dict[type, type] = {AdminEncoderLayer: ScaledInputEncoderLayer, AdminDecoderLayer: ScaledInputDecoderLayer}


@torch.no_grad()
def fold_admin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in torch's own ``nn.Transformer*`` classes, ω folded into the neighbouring weights, whose
    outputs are equal: for inference with torch's fused paths, for export, or for code that knows no ADMIN.

    The residual stream carries ω ⊙ x where it carried x: γ and β of the norm before a sub-layer are multiplied by ω,
    and the columns of the sub-layer's weights that read the stream (query, key and value of self-attention, query of
    cross-attention, linear1) are divided by it. What leaves a stack, the encoder output that every decoder layer reads
    among it, has no ω after it and stays as it is. No norm precedes the first sub-layer of a stack: where its ω is
    not 1, that layer is a ``ScaledInputEncoderLayer`` or ``ScaledInputDecoderLayer``, torch's layer of
    ``src ⊙ input_scale``.

    Layers of an ``nn.TransformerEncoder`` or ``nn.TransformerDecoder`` follow each other; any other layer is folded as
    a first one.

    Raises:
        ValueError: an entry of ω that is zero or not finite (what it blocks cannot be undone), a model without
            AdminNorm, an AdminNorm that is no part of an ADMIN layer or has options a LayerNorm does not know, or
            weights that several layers share or a parametrization computes.
    """
    check_module("model", model)
    check_whole("model", model, "load the full state dict into a model that is not sharded, and fold that")
    _check_foldable(model)
    folded = copy.deepcopy(model)
    layers = [part for part in folded.modules() if isinstance(part, AdminLayer)]
    preceding = _preceding_layers(folded)
    for layer in layers:
        before = preceding.get(id(layer))
        _fold_omegas(layer, None if before is None else getattr(before, f"norm{sublayers(before)[-1]}"))
    for part in folded.modules():
        if type(part) in TORCH_CLASS:
            part.__class__ = TORCH_CLASS[type(part)]
    for layer in layers:
        _take_layer_norms(layer)
    return folded


def _check_foldable(model: nn.Module) -> None:
    named = {name: part for name, part in model.named_modules() if isinstance(part, AdminLayer)}
    layers = named.values()
    known = {id(getattr(layer, f"norm{number}")) for layer in layers for number in sublayers(layer)}
    for name, norm in admin_norms(model).items():
        if id(norm) not in known:
            raise ValueError(
                f"model: expected every AdminNorm in an AdminEncoderLayer or AdminDecoderLayer, got {name} elsewhere"
            )
        if norm.norm != "layer" or norm.branch_bias is not None or norm.weight is None:
            raise ValueError(f"model: expected a LayerNorm with a weight and no branch_bias at {name}, got {norm}")
        if not (norm.omega.isfinite() & norm.omega.reciprocal().isfinite()).all():
            raise ValueError(
                f"model: expected ω without zeros at {name}, got a smallest |ω| of {norm.omega.abs().min().item()}; "
                f"the weights after it would have to be divided by zero"
            )
    for name, layer in named.items():
        check_weights(name, layer)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if uses[id(parameter)] > 1 and any(parameter is own for layer in layers for own in layer.parameters()):
            raise ValueError(f"model: expected parameters of its own in every layer, got {name} in several places")


def _preceding_layers(model: nn.Module) -> dict[int, AdminLayer]:
    """By the id of a layer in one of torch's stacks: the ADMIN layer before it."""
    stacks = [part for part in model.modules() if isinstance(part, (nn.TransformerEncoder, nn.TransformerDecoder))]
    pairs = [pair for stack in stacks for pair in itertools.pairwise(stack.layers)]
    return {id(layer): before for before, layer in pairs if isinstance(before, AdminLayer)}


def _fold_omegas(layer: AdminLayer, norm_before: AdminNorm | None) -> None:
    """ω of each sub-layer into the norm before it and the weights that read the stream there."""
    for number, reader in zip(sublayers(layer), _readers(layer), strict=True):
        omega = getattr(layer, f"norm{number}").omega
        if norm_before is not None:
            for parameter in norm_before.weight, norm_before.bias:
                if parameter is not None:
                    parameter.mul_(omega)
            reader.div_(omega)
        elif not bool((omega == 1).all()):
            layer.__class__ = _SCALED[type(layer)]
            layer.input_scale = nn.Parameter(omega.clone(), requires_grad=omega.requires_grad)
            reader.div_(omega)
        norm_before = getattr(layer, f"norm{number}")


def _readers(layer: AdminLayer) -> list[Tensor]:
    """By sub-layer: the weights (rows, d) that are applied to the residual stream."""
    if isinstance(layer, AdminDecoderLayer):
        cross = layer.multihead_attn
        return [layer.self_attn.in_proj_weight, cross.in_proj_weight[: cross.embed_dim], layer.linear1.weight]
    return [layer.self_attn.in_proj_weight, layer.linear1.weight]


def _take_layer_norms(layer: nn.Module) -> None:
    """The opposite of what AdminEncoderLayer does to torch's layer when it is made."""
    for number in sublayers(layer):
        admin = getattr(layer, f"norm{number}")
        norm = nn.LayerNorm(admin.normalized_shape, admin.eps, bias=admin.bias is not None, device="meta")
        norm.weight, norm.bias = admin.weight, admin.bias
        setattr(layer, f"norm{number}", norm.train(admin.training))
        setattr(layer, f"dropout{number}", nn.Dropout(admin.dropout).train(admin.training))
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = _fused_activation(layer.activation)


def _fused_activation(activation: Any) -> int:
    """The number by which nn.TransformerEncoderLayer knows the activations of its fused inference path."""
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0
