"""The parts of masked-language-model heads of transformers, whose classes name them differently."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast.nn import MultiLayerMLMHead
from repdeg_fast.nn.mlm_head import Activation, masked_lm_losses

Model = TypeVar("Model", bound=nn.Module)


class _Names(NamedTuple):
    """Where the parts are, in a model or in its head."""

    dense: str
    activation: str | None  # None: GELU
    layer_norm: str
    decoder: str

    def below(self, *places: str) -> list[_Names]:
        """The same names below each of ``places``, and as they are."""
        activation = self.activation
        return [
            _Names(
                f"{place}.{self.dense}",
                activation and f"{place}.{activation}",
                f"{place}.{self.layer_norm}",
                f"{place}.{self.decoder}",
            )
            for place in places
        ] + [self]


_BERT = _Names("transform.dense", "transform.transform_act_fn", "transform.LayerNorm", "decoder")
_ROBERTA = _Names("dense", None, "layer_norm", "decoder")
_NAMES = [
    *_BERT.below("cls.predictions", "predictions"),
    *_ROBERTA.below("lm_head"),
    _Names("head.dense", "head.act", "head.norm", "decoder"),  # ModernBERT
    _Names("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),  # DistilBERT
    _Names(
        "generator_predictions.dense",
        "generator_predictions.activation",
        "generator_predictions.LayerNorm",
        "generator_lm_head",
    ),  # ELECTRA's generator
]


class HuggingFaceHead(NamedTuple):
    """dense → activation → LayerNorm → decoder."""

    dense: nn.Linear
    activation: Activation
    layer_norm: nn.LayerNorm
    decoder: nn.Linear

    @classmethod
    def of(cls, model_or_head: nn.Module) -> HuggingFaceHead:
        for names in _NAMES:
            try:
                dense, layer_norm, decoder = attrgetter(names.dense, names.layer_norm, names.decoder)(model_or_head)
            except AttributeError:
                continue
            activation = F.gelu if names.activation is None else attrgetter(names.activation)(model_or_head)
            return cls(dense, activation, layer_norm, decoder)
        raise TypeError(
            "model_or_head: expected a masked-language model of the BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT "
            f"family, or the head of a BERT or RoBERTa, got {type(model_or_head).__name__}"
        )

    def transform(self, hidden_states: Tensor) -> Tensor:
        return self.layer_norm(self.activation(self.dense(hidden_states)))

    def logits(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


def mlm_losses(head: HuggingFaceHead, layers: Sequence[Tensor], labels: Tensor, **options: Any) -> Tensor:
    """(K,): the loss of each of K layers' outputs (B, T, d) through one head, over the positions that have a label;
    ``options`` of :func:`repdeg_fast.multi_layer_mlm_loss`.

    No ``padding_idx``: the row of the padding word is a word like others to a decoder of Hugging Face.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of token ids, int64 or int32, got {given}")
    positions = layers[0].shape[:-1]
    if labels.numel() != positions.numel():
        raise ValueError(f"labels: expected shape {tuple(positions)}, a token a position, got {tuple(labels.shape)}")
    labels = labels.to(layers[0].device).reshape(positions)
    decoder = head.decoder
    losses = masked_lm_losses(layers, labels, head.transform, decoder.weight, decoder.bias, **options)
    assert isinstance(losses, Tensor)  # nothing else is asked for
    return losses


@torch.no_grad()
def read_mlm_head(model_or_head: nn.Module) -> MultiLayerMLMHead:
    """A :class:`~repdeg_fast.MultiLayerMLMHead` with the weights of the head of a masked-language model of transformers
    (for BERT and RoBERTa also of its ``cls``, ``cls.predictions`` or ``lm_head``): dense, LayerNorm and bias copied,
    the projection tied to the same parameter as there. A bias that is not there becomes zeros. As there, the padding
    word's row is projected on, and trained, like any other.

    Raises:
        TypeError: there is no such head.
    """
    parts = HuggingFaceHead.of(model_or_head)
    hidden_size, norm, bias = parts.dense.in_features, parts.layer_norm, parts.decoder.bias is not None
    head = MultiLayerMLMHead(
        hidden_size, parts.decoder, activation=parts.activation, layer_norm_eps=norm.eps, bias=bias
    )
    for ours, theirs in ((head.dense, parts.dense), (head.layer_norm, norm)):
        ours.weight.copy_(theirs.weight)
        ours.bias.zero_() if theirs.bias is None else ours.bias.copy_(theirs.bias)
    if head.bias is not None:
        head.bias.copy_(parts.decoder.bias)
    return head.train(model_or_head.training)


@torch.no_grad()
def write_mlm_head(head: MultiLayerMLMHead, model_or_head: Model) -> Model:
    """Write the weights of ``head`` into a masked-language model's head, where :func:`read_mlm_head` takes them from,
    and return the model.

    In place, so that what is tied there stays tied. Its activation is left as it is.

    Raises:
        TypeError: there is no such head, or ``head`` is none of ours.
        ValueError: it has other shapes, or a bias where ``head`` has none, or none where ``head`` has one.
    """
    if not isinstance(head, MultiLayerMLMHead):
        raise TypeError(f"head: expected a MultiLayerMLMHead, got {type(head).__name__}")
    parts = HuggingFaceHead.of(model_or_head)
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "dense.weight": (head.dense.weight, parts.dense.weight),
        "dense.bias": (head.dense.bias, parts.dense.bias),
        "layer_norm.weight": (head.layer_norm.weight, parts.layer_norm.weight),
        "layer_norm.bias": (head.layer_norm.bias, parts.layer_norm.bias),
        "weight": (head.weight, parts.decoder.weight),
        "bias": (head.bias, parts.decoder.bias),
    }
    for name, (ours, theirs) in pairs.items():
        _check_alike(name, ours, theirs)
    for ours, theirs in pairs.values():
        if ours is not None and theirs is not None and ours is not theirs:
            theirs.copy_(ours)
    return model_or_head


def _check_alike(name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    mine, other = (None if tensor is None else tuple(tensor.shape) for tensor in (ours, theirs))
    if mine != other:
        raise ValueError(f"model_or_head: expected {name} of shape {mine} as in head, got {other}")
