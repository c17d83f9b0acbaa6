"""The native row kernel of the contrastive loss: csrc/cpu/contrastive.cpp, products by csrc/cpu/gemm.h."""

from __future__ import annotations

from repdeg_fast.contracts.contrastive import BlockRule, ScoreBlock
from repdeg_fast.native import Namespace
from repdeg_fast.native.linear_cross_entropy import Products


class RowKernels(Products):
    def __init__(self, operators: Namespace) -> None:
        super().__init__(operators)
        self._rows = operators.contrastive_rows.default

    def rows(self, block: ScoreBlock, rule: BlockRule) -> None:
        *vectors, query_ids, document_ids, grad_loss = block
        self._rows(*vectors, *(query_ids or (None, None)), *(document_ids or (None, None)), grad_loss, *rule)
