"""How degenerate is an embedding: what the measures of this package say of it, each computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repdeg_fast._checks import InputError
from repdeg_fast.analysis.cosines import direction_sum, mean_cosine
from repdeg_fast.analysis.covariances import CHUNK, Covariances
from repdeg_fast.analysis.spectrum import isoscore, leading_plane, singular_values

_WIDEST = 16384  # the d×d Gram matrix is in float64: 2 GiB


@dataclass(frozen=True)
class Inspection:
    """Measurements in float64 of an (N, d) embedding; singular values in descending order."""

    rows: int
    columns: int
    dtype: torch.dtype
    cosreg: float  # R, over all N² pairs as the paper defines it
    mean_cosine: float  # over pairs of different non-zero rows
    mean_direction_norm: float  # ‖mean of the unit rows‖: 0 for rows in all directions, 1 for rows in one
    norms: Tensor  # (N,)
    singular_values: Tensor  # (d,), of the matrix as it is: their squares add up to the energy
    centred_singular_values: Tensor  # (d,), of the matrix less its mean row: their squares add up to the variance
    plane: Tensor  # (d, 2), the two leading right singular vectors
    isoscore: float

    @property
    def zero_rows(self) -> int:
        return int((self.norms == 0).sum())


def check_finite(weight: Tensor, name: str = "the tensor") -> None:
    """Raises InputError for NaN or Inf, with how many there are and where the first is."""
    bad = torch.cat([(~torch.isfinite(rows)).sum(1) for rows in weight.split(CHUNK)])
    if bad.any():
        raise InputError(
            f"weights: {name} has {int(bad.sum())} non-finite values (NaN or Inf), in {int((bad > 0).sum())} of"
            f" {len(bad)} rows (first: row {int(bad.nonzero()[0])}); repair them or choose another tensor"
        )


def inspect_embedding(weight: Tensor, tick: Callable[[int], None] = lambda rows: None) -> Inspection:
    """One pass over the rows, a chunk at a time: beyond the weight only a d×d matrix is in memory."""
    check_finite(weight)
    n, d = weight.shape
    if d > _WIDEST:
        raise InputError(f"weights: expected rows of at most {_WIDEST:,} values, got shape ({n}, {d}); transposed?")
    covariances, norms = Covariances(["weight"]), []
    for rows in weight.split(CHUNK):
        covariances.update(rows)
        norms.append(rows.double().norm(dim=1))
        tick(len(rows))
    total, nonzero = direction_sum(weight)
    return Inspection(
        rows=n,
        columns=d,
        dtype=weight.dtype,
        cosreg=(float(total.square().sum()) - nonzero) / n**2,
        mean_cosine=mean_cosine(total, nonzero),
        mean_direction_norm=float(total.norm()) / max(nonzero, 1),
        norms=torch.cat(norms),
        singular_values=singular_values(covariances),
        centred_singular_values=singular_values(covariances, centred=True),
        plane=leading_plane(covariances),
        isoscore=isoscore(covariances),
    )
