"""``forward`` of masked-language models of transformers with the fused head and loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    BertForMaskedLM,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    ModernBertForMaskedLM,
    RobertaForMaskedLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from repdeg_fast.integrations.huggingface.fused import FusedModel, divided
from repdeg_fast.integrations.huggingface.heads import HuggingFaceHead, mlm_losses

Output = tuple[Tensor, ...] | MaskedLMOutput


class FusedMaskedLM(FusedModel):
    """What the families share. Their ``forward`` differ in their signatures, which are kept."""

    def _fused(self, labels: Tensor | None, inputs: dict[str, Any], kwargs: dict[str, Any]) -> Output:
        skip_logits, as_tuple = kwargs.pop("skip_logits", None), self._as_tuple(kwargs.pop("return_dict", None))
        outputs = self.base_model(**inputs, return_dict=True, **kwargs)
        hidden_states, head = outputs[0], HuggingFaceHead.of(self)
        skips = labels is not None and self._skips_logits(skip_logits, as_tuple)
        output = MaskedLMOutput(
            loss=None if labels is None else self._loss(head, hidden_states, labels, kwargs),
            logits=None if skips else self._logits(head, hidden_states, labels),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if as_tuple else output

    def _loss(self, head: HuggingFaceHead, hidden_states: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return mlm_losses(head, [hidden_states], labels)[0]

    def _logits(self, head: HuggingFaceHead, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        return head.logits(hidden_states)


class _FusedBertLike(FusedMaskedLM):
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
    ) -> Output:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        return self._fused(labels, inputs, kwargs)


class FusedBertForMaskedLM(_FusedBertLike, BertForMaskedLM):
    pass


class FusedRobertaForMaskedLM(_FusedBertLike, RobertaForMaskedLM):
    pass


class FusedElectraForMaskedLM(FusedMaskedLM, ElectraForMaskedLM):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._fused(labels, inputs, kwargs)


class FusedDistilBertForMaskedLM(FusedMaskedLM, DistilBertForMaskedLM):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
        }
        return self._fused(labels, inputs, kwargs)


class FusedModernBertForMaskedLM(FusedMaskedLM, ModernBertForMaskedLM):
    """Its loss is the sum over ``num_items_in_batch``, where a Trainer that accumulates gradients gives it. Batches may
    be flattened (``DataCollatorWithFlattening``)."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Output:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._fused(labels, inputs, kwargs)

    def _loss(self, head: HuggingFaceHead, hidden_states: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        items, ignore_index = kwargs.get("num_items_in_batch"), kwargs.get("ignore_index", -100)
        reduction = "mean" if items is None else "sum"
        losses = mlm_losses(head, [hidden_states], labels, ignore_index=ignore_index, reduction=reduction)
        return divided(losses[0], items)

    def _logits(self, head: HuggingFaceHead, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        if self.sparse_prediction and labels is not None:  # as there: of the masked positions
            hidden_states = hidden_states.flatten(0, -2)[labels.flatten() != self.sparse_pred_ignore_index]
        return head.logits(hidden_states)


FUSED_MASKED: dict[type, type[FusedModel]] = {
    BertForMaskedLM: FusedBertForMaskedLM,
    RobertaForMaskedLM: FusedRobertaForMaskedLM,
    DistilBertForMaskedLM: FusedDistilBertForMaskedLM,
    ElectraForMaskedLM: FusedElectraForMaskedLM,
    ModernBertForMaskedLM: FusedModernBertForMaskedLM,
}
