"""How degenerate is an embedding: CosReg's R, norms, and the spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repdeg_fast._checks import InputError

CHUNK = 4096  # rows in float64 at a time
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
    gram = torch.zeros(d, d, dtype=torch.float64)
    total, unit_total = torch.zeros(2, d, dtype=torch.float64)
    norms = torch.empty(n, dtype=torch.float64)
    for start in range(0, n, CHUNK):
        rows = weight[start : start + CHUNK].double()
        norm = rows.norm(dim=1)
        norms[start : start + CHUNK] = norm
        gram.addmm_(rows.T, rows)
        total += rows.sum(0)
        unit_total += (rows / norm.masked_fill(norm == 0, 1)[:, None]).sum(0)
        tick(len(rows))
    nonzero = int((norms > 0).sum())
    off_diagonal = float(unit_total.square().sum()) - nonzero
    energies, vectors = torch.linalg.eigh(gram)
    mean = total / n
    variances = torch.linalg.eigvalsh(gram - n * torch.outer(mean, mean))
    return Inspection(
        rows=n,
        columns=d,
        dtype=weight.dtype,
        cosreg=off_diagonal / n**2,
        mean_cosine=off_diagonal / (nonzero * (nonzero - 1)) if nonzero > 1 else math.nan,
        mean_direction_norm=float(unit_total.norm()) / max(nonzero, 1),
        norms=norms,
        singular_values=energies.clamp_min(0).sqrt().flip(0),
        centred_singular_values=variances.clamp_min(0).sqrt().flip(0),
        plane=_plane(vectors, mean),
    )


def _plane(vectors: Tensor, mean: Tensor) -> Tensor:
    """The two leading singular vectors. They have no sign of their own: turned so that the mean row points up right."""
    plane = torch.zeros(len(mean), 2, dtype=mean.dtype)
    plane[:, : min(2, len(mean))] = vectors.flip(1)[:, :2]
    return plane * torch.where(mean @ plane < 0, -1.0, 1.0)


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the energy shares: d where all directions are used alike, 1 where one is."""
    share = singular_values.square()
    share = share[share > 0] / share.sum()
    return float((-(share * share.log()).sum()).exp())


def participation_ratio(singular_values: Tensor) -> float:
    """(Σ σ²)² / Σ σ⁴, the same idea with more weight on the large ones."""
    energy = singular_values.square()
    return float(energy.sum() ** 2 / energy.square().sum()) if energy.any() else 0.0


def directions_for(singular_values: Tensor, share: float) -> int:
    """How many leading directions hold ``share`` of the energy."""
    cumulative = singular_values.square().cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum()) + 1
