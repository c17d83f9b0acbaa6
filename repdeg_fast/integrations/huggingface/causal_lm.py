"""``forward`` of causal language models of transformers with the fused head and loss.

All of them are a decoder, a linear head (Gemma 2 and 3: a softcap behind it) and the cross entropy of the next token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PhiForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

from repdeg_fast._checks import is_dtensor
from repdeg_fast.functional import linear_cross_entropy
from repdeg_fast.integrations.huggingface.fused import FusedModel, divided


class FusedCausalLM(FusedModel):
    """Where a loss is wanted without logits it is fused; anything else is the model's own ``forward``."""

    output_class: type = CausalLMOutputWithPast
    softcapped: bool = False  # by config.final_logit_softcapping

    def unfused(self) -> str | None:
        head = self.get_output_embeddings()
        if self.loss_function is not ForCausalLMLoss:
            return "the model has a loss function of its own"
        plain = type(head) is nn.Linear or (isinstance(head, nn.Linear) and is_dtensor(head.weight))
        if not plain or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
            return f"its head is not a plain nn.Linear ({type(head).__name__}, which may be hooked)"
        return None

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        skip_logits, as_tuple = inputs.pop("skip_logits", None), self._as_tuple(inputs.get("return_dict"))
        if not self._wants_loss_alone(inputs, skip_logits, as_tuple):
            return original(self, **inputs)
        labels = inputs.pop("labels")
        for name in ("logits_to_keep", "return_dict"):
            inputs.pop(name, None)
        outputs = self.base_model(**inputs, return_dict=True)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = self.output_class(loss=self._loss(outputs.last_hidden_state, labels, inputs), **others)
        return output.to_tuple() if as_tuple else output

    def _wants_loss_alone(self, inputs: dict[str, Any], skip_logits: bool | None, as_tuple: bool) -> bool:
        if inputs.get("labels") is None or not self._skips_logits(skip_logits, as_tuple):
            return False
        to_keep = inputs.get("logits_to_keep", 0)  # of some positions the loss is whatever the model makes of it
        return not isinstance(to_keep, Tensor) and to_keep == 0 and self.unfused() is None

    def _loss(self, hidden_states: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """As ``ForCausalLMLoss``: the mean, or the sum over ``num_items_in_batch``."""
        head = self.get_output_embeddings()
        items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        loss = linear_cross_entropy(
            hidden_states,
            head.weight,
            (labels if shifted is None else shifted).to(hidden_states.device),
            head.bias,
            shift=shifted is None,
            ignore_index=kwargs.get("ignore_index", -100),
            softcap=self.config.final_logit_softcapping if self.softcapped else None,
            reduction="mean" if items is None else "sum",
        )
        assert isinstance(loss, Tensor)  # nothing else is asked for
        return divided(loss, items)


def _forward_of(original: type) -> Callable[..., Any]:
    """The fused ``forward`` with the signature of the original's, which a Trainer and ``generate`` look at."""
    names = tuple(inspect.signature(original.forward).parameters)[1:]  # type: ignore[attr-defined]

    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: FusedCausalLM, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        return self._forward(original.forward, kwargs)  # type: ignore[attr-defined]

    return forward


class FusedLlamaForCausalLM(FusedCausalLM, LlamaForCausalLM):
    forward = _forward_of(LlamaForCausalLM)


class FusedMistralForCausalLM(FusedCausalLM, MistralForCausalLM):
    forward = _forward_of(MistralForCausalLM)


class FusedQwen2ForCausalLM(FusedCausalLM, Qwen2ForCausalLM):
    forward = _forward_of(Qwen2ForCausalLM)


class FusedQwen3ForCausalLM(FusedCausalLM, Qwen3ForCausalLM):
    forward = _forward_of(Qwen3ForCausalLM)


class FusedGemmaForCausalLM(FusedCausalLM, GemmaForCausalLM):
    forward = _forward_of(GemmaForCausalLM)


class FusedGemma2ForCausalLM(FusedCausalLM, Gemma2ForCausalLM):
    forward, softcapped = _forward_of(Gemma2ForCausalLM), True


class FusedGemma3ForCausalLM(FusedCausalLM, Gemma3ForCausalLM):
    forward, softcapped = _forward_of(Gemma3ForCausalLM), True


class FusedGPT2LMHeadModel(FusedCausalLM, GPT2LMHeadModel):
    forward, output_class = _forward_of(GPT2LMHeadModel), CausalLMOutputWithCrossAttentions


class FusedGPTNeoXForCausalLM(FusedCausalLM, GPTNeoXForCausalLM):
    forward = _forward_of(GPTNeoXForCausalLM)


class FusedPhiForCausalLM(FusedCausalLM, PhiForCausalLM):
    forward = _forward_of(PhiForCausalLM)


FUSED_CAUSAL: dict[type, type[FusedModel]] = {
    LlamaForCausalLM: FusedLlamaForCausalLM,
    MistralForCausalLM: FusedMistralForCausalLM,
    Qwen2ForCausalLM: FusedQwen2ForCausalLM,
    Qwen3ForCausalLM: FusedQwen3ForCausalLM,
    GemmaForCausalLM: FusedGemmaForCausalLM,
    Gemma2ForCausalLM: FusedGemma2ForCausalLM,
    Gemma3ForCausalLM: FusedGemma3ForCausalLM,
    GPT2LMHeadModel: FusedGPT2LMHeadModel,
    GPTNeoXForCausalLM: FusedGPTNeoXForCausalLM,
    PhiForCausalLM: FusedPhiForCausalLM,
}
