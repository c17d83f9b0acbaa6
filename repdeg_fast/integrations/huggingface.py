"""Hugging Face models with the fused masked-language-model loss. Needs transformers 5
(``pip install 'repdeg-fast[hf]'``).

Example::

    from repdeg_fast.integrations import huggingface

    model = huggingface.apply(BertForMaskedLM.from_pretrained("bert-base-uncased"))
    Trainer(model, ...).train()
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from repdeg_fast.nn.mlm_head import HuggingFaceHead, masked_lm_losses

try:
    from transformers import BertForMaskedLM, PreTrainedModel, RobertaForMaskedLM
    from transformers.modeling_outputs import MaskedLMOutput
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise ImportError(
        f"repdeg_fast.integrations.huggingface needs transformers 5 ({error}): pip install 'repdeg-fast[hf]'"
    ) from error

LOGITS = ("auto", "always", "never")

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, *, logits: str = "auto") -> Model:
    """Give a ``BertForMaskedLM`` or ``RobertaForMaskedLM`` the fused head and loss, in place, and return it.

    The weights, their names and tying, the signature of ``forward`` and the loss stay as they are, so ``Trainer``,
    ``save_pretrained`` and checkpoints work as before; a saved model is an ordinary one. What changes: with ``labels``,
    the head runs on masked positions only and the (B, T, V) logits are not made. The mean loss is in float32, and 0
    for a batch without masks, where Hugging Face has NaN.

    Apply it before ``torch.compile``, ``DistributedDataParallel`` and the like. A model that has it already takes over
    the options.

    Args:
        logits: whether logits are computed beside a loss. ``"auto"``: in eval mode only, so that ``Trainer.evaluate``
            with ``compute_metrics`` and ``Trainer.predict`` have them; ``"always"``; ``"never"``. Without ``labels``
            they always are. ``model(..., skip_logits=True)``, or ``False``, decides for one call: the argument that
            ``Trainer`` passes with ``use_liger_kernel`` where it needs the loss only. A ``logits`` that was not
            computed is ``None``.

    Raises:
        TypeError: for any other model, subclasses of these included (their ``forward`` might do something else).
        ValueError: for an unknown ``logits``.
    """
    if logits not in LOGITS:
        raise ValueError(f"logits: expected one of {', '.join(LOGITS)}, got {logits!r}")
    if not isinstance(model, _FusedMaskedLM):
        if type(model) not in _FUSED:
            supported = " or ".join(cls.__name__ for cls in _FUSED)
            raise TypeError(f"model: expected a {supported} of transformers, got {type(model).__name__}")
        # The class is what is exchanged, not an attribute `forward` of the object: unlike that, it is copied, pickled
        # and wrapped (accelerate) like any model's.
        model.__class__ = _FUSED[type(model)]
    model.logits_beside_loss = logits  # type: ignore[assignment]
    return model


def revert(model: Model) -> Model:
    """Undo :func:`apply`, in place, and return the model. One that it was not applied to is left as it is."""
    if isinstance(model, _FusedMaskedLM):
        vars(model).pop("logits_beside_loss", None)
        model.__class__ = next(original for original, fused in _FUSED.items() if fused is type(model))
    return model


class _FusedMaskedLM(PreTrainedModel):
    """``forward`` of the two models. They differ in how the parts of their heads are called."""

    logits_beside_loss: str = "auto"

    @can_return_tuple
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
        skip_logits = kwargs.pop("skip_logits", None)
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
        return MaskedLMOutput(
            loss=None if labels is None else _loss(head, hidden_states, labels),
            logits=None if labels is not None and self._skips_logits(skip_logits) else head.logits(hidden_states),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _skips_logits(self, asked: bool | None) -> bool:
        if asked is not None:
            return asked
        return self.logits_beside_loss == "never" or (self.logits_beside_loss == "auto" and self.training)


def _loss(head: HuggingFaceHead, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """No ``padding_idx``: the row of the padding word is a word like others to a decoder of Hugging Face."""
    labels = labels.to(hidden_states.device).view(hidden_states.shape[:-1])
    return masked_lm_losses([hidden_states], labels, head.transform, head.decoder.weight, head.decoder.bias)[0]


class FusedBertForMaskedLM(_FusedMaskedLM, BertForMaskedLM):
    pass


class FusedRobertaForMaskedLM(_FusedMaskedLM, RobertaForMaskedLM):
    pass


_FUSED: dict[type, type] = {BertForMaskedLM: FusedBertForMaskedLM, RobertaForMaskedLM: FusedRobertaForMaskedLM}
for _original, _fused in _FUSED.items():
    _fused.__name__ = _original.__name__  # what `save_pretrained` writes into config.json, and `Trainer` looks up
