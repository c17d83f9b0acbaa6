"""Hugging Face models with the fused masked-language-model loss, and with ADMIN's residual blocks. Needs transformers 5
(``pip install 'repdeg-fast[hf]'``).

Example::

    from repdeg_fast.integrations import huggingface

    model = huggingface.apply(BertForMaskedLM.from_pretrained("bert-base-uncased"))
    Trainer(model, ...).train()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._checks import check_choice, check_flag
from repdeg_fast.nn import MultiLayerMLMHead, admin_norm_like
from repdeg_fast.nn.mlm_head import Activation, masked_lm_losses

try:
    from transformers import BertForMaskedLM, PreTrainedModel, RobertaForMaskedLM
    from transformers.modeling_outputs import MaskedLMOutput
    from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
    from transformers.models.roberta.modeling_roberta import RobertaOutput, RobertaSelfOutput
except ImportError as error:
    raise ImportError(
        f"repdeg_fast.integrations.huggingface needs transformers 5 ({error}): pip install 'repdeg-fast[hf]'"
    ) from error

LOGITS = ("auto", "always", "never")

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, *, logits: str = "auto", admin_norm: bool = False) -> Model:
    """Give a ``BertForMaskedLM`` or ``RobertaForMaskedLM`` the fused head and loss, in place, and return it.

    The weights, their names and tying, the signature of ``forward`` and the loss stay as they are, so ``Trainer``,
    ``save_pretrained`` and checkpoints work as before; a saved model is an ordinary one. What changes: with ``labels``,
    the head runs on masked positions only and the (B, T, V) logits are not made. The mean loss is in float32, and 0
    for a batch without masks, where Hugging Face has NaN.

    Apply it before ``torch.compile``, ``DistributedDataParallel`` and the like. A model that has it already takes over
    the options.

    Args:
        logits: whether logits are computed beside a loss. ``"auto"``: in eval mode only, so that ``Trainer.evaluate``
            with ``compute_metrics`` and ``Trainer.predict`` have them, and with ``return_dict=False``, in whose tuple
            they have a place; ``"always"``; ``"never"``. Without ``labels`` they always are.
            ``model(..., skip_logits=True)``, or ``False``, decides for one call: the argument that ``Trainer`` passes
            with ``use_liger_kernel`` where it needs the loss only. A ``logits`` that was not computed is ``None``, and
            left out of a tuple.
        admin_norm: also replace dropout, residual sum and LayerNorm of each layer by one
            :class:`~repdeg_fast.AdminNorm`, with the same weight and bias and a new parameter ω of ones
            (``...LayerNorm.omega``; make the optimizer afterwards). Outputs stay the same until ω changes, but for the
            dropout masks, which are others. An ordinary model has no place for ω: ``from_pretrained`` reports it as
            unexpected and leaves it out.

    Raises:
        TypeError: for any other model, subclasses of these included (their ``forward`` might do something else).
        ValueError: for an unknown ``logits``.
    """
    check_choice("logits", logits, LOGITS)
    check_flag("admin_norm", admin_norm)
    if not isinstance(model, _FusedMaskedLM):
        if type(model) not in _FUSED:
            supported = " or ".join(cls.__name__ for cls in _FUSED)
            raise TypeError(f"model: expected a {supported} of transformers, got {type(model).__name__}")
        # The class is what is exchanged, not an attribute `forward` of the object: unlike that, it is copied, pickled
        # and wrapped (accelerate) like any model's.
        model.__class__ = _FUSED[type(model)]
    model.logits_beside_loss = logits  # type: ignore[assignment]
    if admin_norm:
        for module in list(model.modules()):
            if type(module) in _SUB_LAYER_ENDS:
                AdminOutput.take_over(module)
    return model


def revert(model: Model) -> Model:
    """Undo :func:`apply`, in place, and return the model. One that it was not applied to is left as it is.

    Raises:
        ValueError: an ω of ``admin_norm`` is no longer 1, so that the outputs would change.
    """
    if isinstance(model, _FusedMaskedLM):
        ends = [module for module in model.modules() if isinstance(module, AdminOutput)]
        for end in ends:
            end.check_omega()
        for end in ends:
            end.hand_back()
        vars(model).pop("logits_beside_loss", None)
        model.__class__ = next(original for original, fused in _FUSED.items() if fused is type(model))
    return model


@torch.no_grad()
def read_mlm_head(model_or_head: nn.Module) -> MultiLayerMLMHead:
    """A :class:`~repdeg_fast.MultiLayerMLMHead` with the weights of a BERT or RoBERTa head (``BertForMaskedLM``, its
    ``cls`` or ``cls.predictions``; ``RobertaForMaskedLM``, its ``lm_head``): dense, LayerNorm and bias copied, the
    projection tied to the same parameter as there. As there, the padding word's row is projected on, and trained, like
    any other.

    Raises:
        TypeError: there is no such head.
    """
    parts = HuggingFaceHead.of(model_or_head)
    hidden_size, norm, bias = parts.dense.in_features, parts.layer_norm, parts.decoder.bias is not None
    head = MultiLayerMLMHead(
        hidden_size, parts.decoder, activation=parts.activation, layer_norm_eps=norm.eps, bias=bias
    )
    head.dense.load_state_dict(parts.dense.state_dict())
    head.layer_norm.load_state_dict(norm.state_dict())
    if head.bias is not None:
        head.bias.copy_(parts.decoder.bias)
    return head.train(model_or_head.training)


@torch.no_grad()
def write_mlm_head(head: MultiLayerMLMHead, model_or_head: Model) -> Model:
    """Write the weights of ``head`` into a BERT or RoBERTa head, as :func:`read_mlm_head` takes them, and return that.

    In place, so that what is tied there stays tied. Its activation is left as it is.

    Raises:
        TypeError: there is no such head, or ``head`` is none of ours.
        ValueError: it has other shapes, or a bias where ``head`` has none.
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


class HuggingFaceHead(NamedTuple):
    """The parts of a BERT or RoBERTa masked-language-model head, whose classes name them differently."""

    dense: nn.Linear
    activation: Activation
    layer_norm: nn.LayerNorm
    decoder: nn.Linear

    @classmethod
    def of(cls, model_or_head: nn.Module) -> HuggingFaceHead:
        head = model_or_head
        for name in ("cls", "predictions", "lm_head"):  # of a model, of BERT's cls, of a model
            head = getattr(head, name, head)
        transform = getattr(head, "transform", head)
        names = ("dense", "LayerNorm" if hasattr(transform, "LayerNorm") else "layer_norm")
        parts: list[Any] = [getattr(transform, name, None) for name in names] + [getattr(head, "decoder", None)]
        if not all(isinstance(part, nn.Module) for part in parts):
            raise TypeError(
                "model_or_head: expected BertForMaskedLM or RobertaForMaskedLM, or the head of one (cls.predictions, "
                f"lm_head), got {type(model_or_head).__name__}"
            )
        dense, layer_norm, decoder = parts
        return cls(dense, getattr(transform, "transform_act_fn", F.gelu), layer_norm, decoder)

    def transform(self, hidden_states: Tensor) -> Tensor:
        return self.layer_norm(self.activation(self.dense(hidden_states)))

    def logits(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


def _check_alike(name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    mine, other = (None if tensor is None else tuple(tensor.shape) for tensor in (ours, theirs))
    if mine != other:
        raise ValueError(f"model_or_head: expected {name} of shape {mine} as in head, got {other}")


class _FusedMaskedLM(PreTrainedModel):
    """``forward`` of the two models. They differ in how the parts of their heads are called."""

    logits_beside_loss: str = "auto"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...] | MaskedLMOutput:
        skip_logits, return_dict = kwargs.pop("skip_logits", None), kwargs.pop("return_dict", None)
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        outputs = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs[0]
        head = HuggingFaceHead.of(self)
        skips = labels is not None and self._skips_logits(skip_logits, as_tuple)
        output = MaskedLMOutput(
            loss=None if labels is None else mlm_losses(head, [hidden_states], labels)[0],
            logits=None if skips else head.logits(hidden_states),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if as_tuple else output

    def _skips_logits(self, asked: bool | None, as_tuple: bool) -> bool:
        if asked is not None:
            return asked
        only_loss = self.training and not as_tuple
        return self.logits_beside_loss == "never" or (self.logits_beside_loss == "auto" and only_loss)


def mlm_losses(head: HuggingFaceHead, layers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """(K,): the mean loss of each of K layers' outputs (B, T, d) through one head, at the positions that have a label.

    No ``padding_idx``: the row of the padding word is a word like others to a decoder of Hugging Face.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of token ids, int64 or int32, got {given}")
    positions = layers[0].shape[:-1]
    if labels.numel() != positions.numel():
        raise ValueError(f"labels: expected shape {tuple(positions)}, a token a position, got {tuple(labels.shape)}")
    labels = labels.to(layers[0].device).reshape(positions)
    return masked_lm_losses(layers, labels, head.transform, head.decoder.weight, head.decoder.bias)


class FusedBertForMaskedLM(_FusedMaskedLM, BertForMaskedLM):
    pass


class FusedRobertaForMaskedLM(_FusedMaskedLM, RobertaForMaskedLM):
    pass


class AdminOutput(nn.Module):
    """The end of a sub-layer of BERT or RoBERTa with ADMIN's residual block, under the names that its parts have."""

    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: Any  # nn.LayerNorm before and after
    original: type[nn.Module]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(input_tensor, self.dense(hidden_states))

    @staticmethod
    def take_over(end: nn.Module) -> None:
        original, end.__class__ = type(end), AdminOutput
        assert isinstance(end, AdminOutput)
        end.LayerNorm, end.original = admin_norm_like(end.LayerNorm, end.dropout.p), original

    def check_omega(self) -> None:
        if not bool((self.LayerNorm.omega == 1).all()):
            raise ValueError(
                "model: an omega of its AdminNorm modules is no longer 1, and a LayerNorm has no place for it; "
                "keep the model as it is, or set the omegas to 1"
            )

    def hand_back(self) -> None:
        norm = self.LayerNorm
        like = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        self.LayerNorm = nn.LayerNorm(norm.normalized_shape, norm.eps, **like).train(norm.training)
        self.LayerNorm.weight, self.LayerNorm.bias = norm.weight, norm.bias
        original = vars(self).pop("original")
        self.__class__ = original


_SUB_LAYER_ENDS = (BertSelfOutput, BertOutput, RobertaSelfOutput, RobertaOutput)
_FUSED: dict[type, type] = {BertForMaskedLM: FusedBertForMaskedLM, RobertaForMaskedLM: FusedRobertaForMaskedLM}
for _original, _fused in _FUSED.items():
    _fused.__name__ = _original.__name__  # what `save_pretrained` writes into config.json, and `Trainer` looks up
