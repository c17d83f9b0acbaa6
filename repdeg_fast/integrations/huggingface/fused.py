"""What the models of transformers with a fused head and loss share."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel


class FusedModel(PreTrainedModel):
    """Whose logits, beside a loss, need not be made."""

    logits_beside_loss: str = "auto"

    def unfused(self) -> str | None:
        """Why the loss is not fused after all, as the model is now."""
        return None

    def _skips_logits(self, asked: bool | None, as_tuple: bool) -> bool:
        if asked is not None:
            return asked
        only_loss = self.training and not as_tuple
        return self.logits_beside_loss == "never" or (self.logits_beside_loss == "auto" and only_loss)

    def _as_tuple(self, return_dict: bool | None) -> bool:
        return not (self.config.return_dict if return_dict is None else return_dict)


def divided(loss: Tensor, items: Tensor | int | None) -> Tensor:
    """A sum over the items of several batches, as a Trainer that accumulates gradients counts them; a mean, where it
    does not."""
    return loss if items is None else loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
