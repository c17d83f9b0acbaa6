"""Hugging Face models with the fused head and loss, masked and causal ones, and with ADMIN's residual blocks. Needs
transformers 5 (``pip install 'repdeg-fast[hf]'``).

Example::

    from repdeg_fast.integrations import huggingface

    model = huggingface.apply(BertForMaskedLM.from_pretrained("bert-base-uncased"))
    Trainer(model, ...).train()
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from repdeg_fast._checks import check_choice, check_flag

try:
    from repdeg_fast.integrations.huggingface.admin import hand_back_sub_layers, take_over_sub_layers
    from repdeg_fast.integrations.huggingface.causal_lm import FUSED_CAUSAL
    from repdeg_fast.integrations.huggingface.fused import FusedModel
    from repdeg_fast.integrations.huggingface.heads import HuggingFaceHead, mlm_losses, read_mlm_head, write_mlm_head
    from repdeg_fast.integrations.huggingface.masked_lm import FUSED_MASKED
    from repdeg_fast.integrations.huggingface.report import Part, Report, describe
except ImportError as error:
    raise ImportError(
        f"repdeg_fast.integrations.huggingface needs transformers 5 ({error}): pip install 'repdeg-fast[hf]'"
    ) from error

__all__ = [
    "HuggingFaceHead",
    "Part",
    "Report",
    "apply",
    "describe",
    "mlm_losses",
    "read_mlm_head",
    "revert",
    "write_mlm_head",
]

FUSED = FUSED_MASKED | FUSED_CAUSAL
for _original, _fused in FUSED.items():
    _fused.__name__ = _original.__name__  # what `save_pretrained` writes into config.json, and `Trainer` looks up

LOGITS = ("auto", "always", "never")

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model, *, loss: bool = True, logits: str = "auto", admin_norm: bool = False, report: bool = False
) -> Model:
    """Give a language model of transformers the fused head and loss, in place, and return it. Masked ones:
    ``BertForMaskedLM``, ``RobertaForMaskedLM``, ``DistilBertForMaskedLM``, ``ElectraForMaskedLM`` (the generator) or
    ``ModernBertForMaskedLM`` (also with flattened batches). Causal ones: ``ForCausalLM`` of Llama, Mistral, Qwen 2 and
    3, Gemma, Gemma 2 and 3 (text), GPT-NeoX and Phi, and ``GPT2LMHeadModel``.

    The weights, their names and tying, the signature of ``forward`` and the loss stay as they are, so ``Trainer``,
    ``save_pretrained`` and checkpoints work as before; a saved model is an ordinary one. What changes: with ``labels``,
    the (B, T, V) logits are not made, and the head of a masked model runs on masked positions only. The mean loss is in
    float32, and 0 for a batch without labels, where Hugging Face has NaN. ``generate``, evaluation with logits and
    whatever else a causal model does is its own ``forward``; so is a loss of ``logits_to_keep``, of a
    ``loss_function`` of your own, or of a head that is no plain ``nn.Linear``.

    Apply it before ``torch.compile``, ``DistributedDataParallel`` and the like. A model that has it already takes over
    the options.

    Args:
        loss: the head and the loss, for which the rest of this is said; ``False`` leaves them as they are.
        logits: whether logits are computed beside a loss. ``"auto"``: in eval mode only, so that ``Trainer.evaluate``
            with ``compute_metrics`` and ``Trainer.predict`` have them, and with ``return_dict=False``, in whose tuple
            they have a place; ``"always"``; ``"never"``. Without ``labels`` they always are.
            ``model(..., skip_logits=True)``, or ``False``, decides for one call: the argument that ``Trainer`` passes
            with ``use_liger_kernel`` where it needs the loss only. A ``logits`` that was not computed is ``None``, and
            left out of a tuple.
        admin_norm: of BERT, RoBERTa and ELECTRA: also replace dropout, residual sum and LayerNorm of each layer by one
            :class:`~repdeg_fast.AdminNorm`, with the same weight and bias and a new parameter ω of ones
            (``...LayerNorm.omega``; make the optimizer afterwards). Outputs stay the same until ω changes, but for the
            dropout masks, which are others. An ordinary model has no place for ω: ``from_pretrained`` reports it as
            unexpected and leaves it out.
        report: print what was replaced and what was left, and why (:func:`describe` returns it).

    Raises:
        TypeError: for any other model, subclasses of these included (their ``forward`` might do something else).
        ValueError: for an unknown ``logits``, or ``admin_norm`` for a model without such sub-layers.
    """
    check_choice("logits", logits, LOGITS)
    for name, flag in (("loss", loss), ("admin_norm", admin_norm), ("report", report)):
        check_flag(name, flag)
    if not isinstance(model, FusedModel) and type(model) not in FUSED:
        raise _unsupported(model)
    if admin_norm:
        take_over_sub_layers(model)
    if loss:
        if not isinstance(model, FusedModel):
            # The class is what is exchanged, not an attribute `forward` of the object: unlike that, it is copied,
            # pickled and wrapped (accelerate) like any model's.
            model.__class__ = FUSED[type(model)]  # type: ignore[assignment]
        model.logits_beside_loss = logits  # type: ignore[assignment]
    else:
        _hand_back_loss(model)
    if report:
        print(describe(model))
    return model


def _unsupported(model: object) -> TypeError:
    """The refusal, which ends with what to do about the model at hand."""
    inner = [getattr(model, name, None) for name in ("_orig_mod", "module", "base_model")]
    if isinstance(model, str):
        remedy = "; load it first, as by AutoModelForMaskedLM.from_pretrained"
    elif any(type(one) in FUSED for one in inner):
        remedy = "; apply it to the model inside, before it is wrapped"
    elif any(isinstance(model, cls) for cls in FUSED):
        remedy = ", a subclass, whose forward may do something else"
    else:
        remedy = ""
    supported = ", ".join(cls.__name__ for cls in FUSED)
    return TypeError(f"model: expected one of {supported} of transformers, got {type(model).__name__}{remedy}")


def revert(model: Model) -> Model:
    """Undo :func:`apply`, in place, and return the model. One that it was not applied to is left as it is.

    Raises:
        ValueError: an ω of ``admin_norm`` is no longer 1, so that the outputs would change.
    """
    hand_back_sub_layers(model)
    _hand_back_loss(model)
    return model


def _hand_back_loss(model: nn.Module) -> None:
    if isinstance(model, FusedModel):
        vars(model).pop("logits_beside_loss", None)
        model.__class__ = next(original for original, fused in FUSED.items() if fused is type(model))
