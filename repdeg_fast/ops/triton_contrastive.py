"""The Triton row kernel of the contrastive loss in the form of its contract. Imported where Triton is to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repdeg_fast.contracts.contrastive import BlockRule, ScoreBlock
from repdeg_fast.ops.products import LibraryProducts

if TYPE_CHECKING:
    from triton_kernels import contrastive as launchers
else:
    from repdeg_fast.triton_kernels import contrastive as launchers


class RowKernels(LibraryProducts):
    def rows(self, block: ScoreBlock, rule: BlockRule) -> None:
        launchers.rows(block, rule)
