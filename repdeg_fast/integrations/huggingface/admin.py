"""ADMIN's residual block in the layers of BERT's family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
from transformers.models.electra.modeling_electra import ElectraOutput, ElectraSelfOutput
from transformers.models.roberta.modeling_roberta import RobertaOutput, RobertaSelfOutput

from repdeg_fast.nn import admin_norm_like

SUB_LAYER_ENDS = (BertSelfOutput, BertOutput, RobertaSelfOutput, RobertaOutput, ElectraSelfOutput, ElectraOutput)


class AdminOutput(nn.Module):
    """The end of a sub-layer with ADMIN's residual block, under the names that its parts have."""

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


def take_over_sub_layers(model: nn.Module) -> None:
    """Replace dropout, residual sum and LayerNorm of each sub-layer, in place.

    Raises:
        ValueError: there is nothing to replace.
    """
    ends = [module for module in model.modules() if type(module) in SUB_LAYER_ENDS]
    if not ends and not any(isinstance(module, AdminOutput) for module in model.modules()):
        raise ValueError(
            "admin_norm: expected a post-LN model whose sub-layers end like BERT's (BERT, RoBERTa, ELECTRA), got "
            f"{type(model).__name__}"
        )
    for end in ends:
        AdminOutput.take_over(end)


def hand_back_sub_layers(model: nn.Module) -> None:
    """Undo :func:`take_over_sub_layers`, in place.

    Raises:
        ValueError: an ω is no longer 1.
    """
    ends = [module for module in model.modules() if isinstance(module, AdminOutput)]
    for end in ends:
        end.check_omega()
    for end in ends:
        end.hand_back()
