"""CosReg as a module."""

from __future__ import annotations

from torch import Tensor, nn

from repdeg_fast import functional
from repdeg_fast._checks import check_finite, check_positive


class CosineRegularization(nn.Module):
    """coefficient · R(W) of an embedding: add it to the loss (CosReg, arXiv 1907.12009).

    Example::

        regularizer = CosineRegularization(coefficient=1.0)
        loss = loss + regularizer(model.get_input_embeddings())

    Args:
        coefficient: γ of the paper, which uses 1.
        eps: smallest norm that is divided by.
    """

    def __init__(self, coefficient: float = 1.0, eps: float = 1e-12) -> None:
        super().__init__()
        check_finite("coefficient", coefficient)
        check_positive("eps", eps)
        self.coefficient = coefficient
        self.eps = eps

    def forward(self, weight: Tensor | nn.Embedding | nn.Linear, row_weight: Tensor | None = None) -> Tensor:
        """Scalar. ``weight``: an (N, d) tensor or a module whose ``weight`` it is; ``row_weight``: (N,) or ``None``.
        Rows are as they stand in the table: one for ``padding_idx``, zero or not, is a row like others."""
        if isinstance(weight, (nn.Embedding, nn.Linear)):
            weight = weight.weight
        return self.coefficient * functional.cosine_regularization(weight, row_weight=row_weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"coefficient={self.coefficient}, eps={self.eps}"
