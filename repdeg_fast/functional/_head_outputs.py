"""What the functions of a vocabulary head return, on one device and over shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast._checks import check_flag
from repdeg_fast.functional._head_arguments import Options
from repdeg_fast.ops import linear_cross_entropy as _ops


class CrossEntropyOutput(NamedTuple):
    """What was asked for beside the loss, from the same sweep over the vocabulary; ``None``: not asked for."""

    loss: Tensor  # the z-loss included
    lse: Tensor | None = None  # (...)
    z_loss: Tensor | None = None  # like the loss; a number to watch, without a graph
    predictions: Tensor | None = None  # (...) or (K, M), int64: the first class with the largest logit
    accuracy: Tensor | None = None  # () or (K,), float32: of the targets that count; 0 where none does


class Asked(NamedTuple):
    """What a call is to return beside the loss."""

    lse: bool
    z_loss: bool
    predictions: bool
    accuracy: bool
    shift: bool | int = False

    @property
    def predict(self) -> bool:
        return self.predictions or self.accuracy

    def arguments(self) -> dict[str, bool | int]:
        """By the names that callers know."""
        return {name if name == "shift" else f"return_{name}": value for name, value in self._asdict().items()}


def checked(lse: bool, z_loss: bool, predictions: bool, accuracy: bool, shift: bool | int = False) -> Asked:
    """What a call asks for; ``shift`` is checked where it is used."""
    check_flag("return_lse", lse)
    check_flag("return_z_loss", z_loss)
    check_flag("return_predictions", predictions)
    check_flag("return_accuracy", accuracy)
    return Asked(lse, z_loss, predictions, accuracy, shift)


def told(
    found: tuple[Tensor, Tensor, Tensor], target: Tensor, positions: torch.Size, options: Options, asked: Asked
) -> Tensor | tuple[Tensor, Tensor] | CrossEntropyOutput:
    """What a call returns, from loss, log-sum-exp and predicted class of rows, one after the other."""
    loss, lse, predicted = found
    loss = loss.view(positions if options.reduction == "none" else ())
    output = CrossEntropyOutput(
        loss,
        lse.view(positions) if asked.lse else None,
        _z_loss(lse, target, 1, options).view(loss.shape) if asked.z_loss else None,
        predicted.view(positions) if asked.predictions else None,
        _accuracy(predicted, target, 1, options.ignore_index).view(()) if asked.accuracy else None,
    )
    if asked.shift:
        output = _cut(output, positions, int(asked.shift))
    if asked.z_loss or asked.predict:
        return output
    return output.loss if output.lse is None else (output.loss, output.lse)


def told_of_heads(
    found: tuple[Tensor, Tensor, Tensor], target: Tensor, heads: int, options: Options, asked: Asked
) -> Tensor | CrossEntropyOutput:
    """:func:`told`, of several heads."""
    loss, lse, predicted = found
    if not (asked.z_loss or asked.predict):
        return loss
    return CrossEntropyOutput(
        loss,
        None,
        _z_loss(lse, target, heads, options) if asked.z_loss else None,
        predicted.view(heads, target.shape[0]) if asked.predictions else None,
        _accuracy(predicted, target, heads, options.ignore_index) if asked.accuracy else None,
    )


def _cut(found: CrossEntropyOutput, positions: torch.Size, steps: int) -> CrossEntropyOutput:
    """Without the last positions of each sequence, in what has one value a position."""
    kept = max(positions[-1] - steps, 0)
    cut = (t[..., :kept] if t is not None and t.shape == positions else t for t in found[1:])
    loss = found.loss[..., :kept] if found.loss.shape == positions else found.loss
    return CrossEntropyOutput(loss, *cut)


@torch.no_grad()
def _z_loss(lse: Tensor, target: Tensor, heads: int, options: Options) -> Tensor:
    reduction = _ops.Reduction(heads, options.lse_square_scale, options.reduction, None)
    return _ops.z_loss(lse, target, options.ignore_index, reduction)


def _accuracy(predicted: Tensor, target: Tensor, heads: int, ignore_index: int) -> Tensor:
    """(K,)"""
    counts = target != ignore_index
    right = (predicted.view(heads, target.shape[0]) == target) & counts
    return right.sum(dim=1).float() / counts.sum().clamp_min(1)
