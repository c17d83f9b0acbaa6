"""What ranks take of their logits while these are there: the largest one of a row, and under a softcap, where it is no
product of sums, what label smoothing needs."""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, softcapped
from repdeg_fast.contracts.linear_cross_entropy import Columns, Head, Look, LossRule
from repdeg_fast.ops.buffers import ranges
from repdeg_fast.ops.chunked_logits import TILE


class LogitLooks:
    """A :data:`~repdeg_fast.contracts.linear_cross_entropy.Look`, some columns at a time. ``head`` is that of a rank,
    ``columns`` says which of the vocabulary it has."""

    def __init__(
        self, head: Head, rule: LossRule, columns: Columns, *, predict: bool, add_up: bool, other: Look | None
    ) -> None:
        hidden_states, weight, target, bias = head
        wide, n, positions = arithmetic_dtype(hidden_states), hidden_states.shape[0], target.shape[0]
        self.softcap, self.other, self.columns = rule.softcap, other, columns
        self.bias = None if bias is None else bias.to(wide)
        class_weight = None if rule.class_weight is None else rule.class_weight.each
        self.class_weight = None if class_weight is None else class_weight[columns.first :][: weight.shape[0]]
        self.most = hidden_states.new_full((n,), -torch.inf, dtype=wide) if predict else None  # the largest z ...
        nowhere = columns.vocabulary
        self.classes = hidden_states.new_full((n,), nowhere, dtype=torch.int64) if predict else None  # … and its class
        self.sums = hidden_states.new_zeros(n, dtype=wide) if add_up else None  # Σ w z
        self.shape = (n // max(positions, 1), positions)

    @property
    def wanted(self) -> Look | None:
        return self if self.most is not None or self.sums is not None else self.other

    def __call__(self, logits: Tensor, first: int) -> None:
        if self.other is not None:
            self.other(logits, first)
        rows = slice(first, first + logits.shape[1])
        for part in ranges(logits.shape[2], TILE):
            tile = slice(*part)
            z = self._logits(logits[..., tile], tile)
            if self.most is not None and self.classes is not None:
                most, classes = (tensor.view(self.shape)[:, rows] for tensor in (self.most, self.classes))
                index = z.argmax(dim=2)  # of equals the first
                largest = z.gather(2, index[..., None])[..., 0]
                new = (largest > most) | (classes == self.columns.vocabulary)
                most.copy_(torch.where(new, largest, most))
                classes.copy_(torch.where(new, index + self.columns.first + tile.start, classes))
            if self.sums is not None:
                weight = None if self.class_weight is None else self.class_weight[tile]
                self.sums.view(self.shape)[:, rows] += z.sum(dim=2) if weight is None else z @ weight

    def _logits(self, logits: Tensor, tile: slice) -> Tensor:
        z = logits.to(arithmetic_dtype(logits))
        if self.bias is not None:
            z = z + self.bias[tile]
        return softcapped(z, self.softcap)
