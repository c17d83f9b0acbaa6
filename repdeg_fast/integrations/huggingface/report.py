"""What :func:`repdeg_fast.integrations.huggingface.apply` replaced in a model, and what not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from repdeg_fast.integrations.huggingface.admin import SUB_LAYER_ENDS, AdminOutput
from repdeg_fast.integrations.huggingface.causal_lm import FusedCausalLM
from repdeg_fast.integrations.huggingface.fused import FusedModel

_LOGITS = {
    "auto": "logits beside a loss in eval mode and in tuples only",
    "always": "logits beside every loss",
    "never": "no logits beside a loss",
}


class Part(NamedTuple):
    name: str
    replaced: bool
    detail: str  # by what, or why not


class Report(NamedTuple):
    model: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        width = max(len(part.name) for part in self.parts)
        lines = (
            f"  {part.name:{width}}  {'replaced' if part.replaced else 'left'}: {part.detail}" for part in self.parts
        )
        return "\n".join([f"repdeg_fast in {self.model}", *lines])


def describe(model: nn.Module) -> Report:
    """What of ``model`` is ours now, and what is left as it was, with the reason."""
    others = (
        Part("attention, MLP", False, "transformers' own; choose attn_implementation there"),
        Part("embeddings", False, "nothing here is faster"),
    )
    return Report(type(model).__name__, (_head_and_loss(model), _residual_blocks(model), *others))


def _head_and_loss(model: nn.Module) -> Part:
    name = "head and loss"
    if not isinstance(model, FusedModel):
        return Part(name, False, "apply(model, loss=True) replaces them where the model is known")
    reason = model.unfused()
    if reason is None and isinstance(model, FusedCausalLM) and model.logits_beside_loss == "always":
        reason = "logits are wanted beside every loss, and then the model's own loss is made of them"
    if reason is not None:
        return Part(name, False, reason)
    return Part(name, True, f"one linear cross entropy, {_LOGITS[model.logits_beside_loss]}")


def _residual_blocks(model: nn.Module) -> Part:
    ours = sum(isinstance(module, AdminOutput) for module in model.modules())
    theirs = sum(type(module) in SUB_LAYER_ENDS for module in model.modules())
    if ours:
        return Part("residual blocks", True, f"dropout, sum and LayerNorm of {ours} sub-layers, each one AdminNorm")
    if theirs:
        return Part("residual blocks", False, f"{theirs} sub-layers that apply(model, admin_norm=True) would take over")
    return Part("residual blocks", False, "not post-LN sub-layers that end like BERT's, for which AdminNorm is")
