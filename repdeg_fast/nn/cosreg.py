"""CosReg as a module."""

from __future__ import annotations

from torch import Tensor, nn

from repdeg_fast import functional
from repdeg_fast._checks import check_choice, check_finite, check_positive
from repdeg_fast.functional.pairwise import KINDS


class CosineRegularization(nn.Module):
    """coefficient · R(W) of an embedding, or another mean over its pairs, for the loss (CosReg, arXiv 1907.12009).

    Example::

        regularizer = CosineRegularization(coefficient=1.0)
        loss = loss + regularizer(model.get_input_embeddings())

    Args:
        coefficient: γ of the paper, which uses 1.
        eps: smallest norm that is divided by.
        kind: "mean" is the paper's :func:`~repdeg_fast.cosine_regularization`, which divides the sum over pairs by N²;
            "square", "abs", "relu" and "logmeanexp" are those of :func:`~repdeg_fast.pairwise_cosine`, means over the
            N(N − 1) pairs. "square" costs O(N·d²), the others O(N²·d): for a whole vocabulary take a sample of rows.
        margin: of "relu".
        temperature: of "logmeanexp".
    """

    def __init__(
        self,
        coefficient: float = 1.0,
        eps: float = 1e-12,
        *,
        kind: str = "mean",
        margin: float = 0.0,
        temperature: float = 0.25,
    ) -> None:
        super().__init__()
        check_finite("coefficient", coefficient)
        check_positive("eps", eps)
        check_choice("kind", kind, KINDS)
        check_finite("margin", margin)
        check_positive("temperature", temperature)
        self.coefficient, self.eps = coefficient, eps
        self.kind, self.margin, self.temperature = kind, margin, temperature

    def forward(self, weight: Tensor | nn.Embedding | nn.Linear, row_weight: Tensor | None = None) -> Tensor:
        """Scalar. ``weight``: an (N, d) tensor or a module whose ``weight`` it is; ``row_weight``: (N,) or ``None``,
        for "mean" alone. Rows are as they stand in the table: one for ``padding_idx``, zero or not, is a row like
        others."""
        if isinstance(weight, (nn.Embedding, nn.Linear)):
            weight = weight.weight
        if self.kind == "mean":
            return self.coefficient * functional.cosine_regularization(weight, row_weight=row_weight, eps=self.eps)
        if row_weight is not None:
            raise ValueError(f"row_weight: expected None with kind={self.kind!r}; kind='mean' alone weights its rows")
        value = functional.pairwise_cosine(
            weight, kind=self.kind, margin=self.margin, temperature=self.temperature, eps=self.eps
        )
        return self.coefficient * value

    def extra_repr(self) -> str:
        options = {"relu": f", margin={self.margin}", "logmeanexp": f", temperature={self.temperature}"}
        kind = "" if self.kind == "mean" else f", kind={self.kind!r}{options.get(self.kind, '')}"
        return f"coefficient={self.coefficient}, eps={self.eps}{kind}"
