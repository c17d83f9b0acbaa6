"""How degenerate is an embedding: CosReg's R, norms, spectrum, and the picture of the cone it lies in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from repdeg_fast.bench.plots import plain, pyplot
from repdeg_fast.bench.suite import InputError, dtype_name

CHUNK = 4096  # rows in float64 at a time
_WIDEST = 16384  # the d×d Gram matrix is in float64: 2 GiB
_SHOWN = 10  # singular values in the table
_POINTS = 20_000  # rows in the picture


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


def tables(name: str, found: Inspection) -> list[Table]:
    return [_overview(name, found), _spectrum(found)]


def _overview(name: str, found: Inspection) -> Table:
    title = f"{name}: {found.rows:,} × {found.columns:,} {dtype_name(found.dtype)}"
    out = Table(title=escape(title), title_justify="left")
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("meaning", style="dim")
    norms, centred = found.norms, found.centred_singular_values
    small, large = float(norms.min()), float(norms.max())
    rows = [
        ("R (CosReg)", f"{found.cosreg:.12f}", "mean cosine over all N² ordered pairs, the diagonal left out"),
        ("mean cosine", f"{found.mean_cosine:.6f}", "over pairs of different non-zero rows; 0: no common direction"),
        ("‖mean unit row‖", f"{found.mean_direction_norm:.6f}", "0: rows in all directions; 1: all in one"),
        ("norms", f"{small:.4g} / {float(norms.median()):.4g} / {large:.4g}", "min / median / max"),
        ("zero rows", f"{found.zero_rows:,}", "padding, or tokens that were never trained"),
        (
            "effective rank",
            f"{effective_rank(centred):.1f}",
            f"of the centred rows, exp of entropy; at most {found.columns:,}",
        ),
        ("participation ratio", f"{participation_ratio(centred):.1f}", "of the centred rows, (Σσ²)²/Σσ⁴"),
        ("90 % of variance", f"{directions_for(centred, 0.9):,}", "leading directions that hold it"),
    ]
    for row in rows:
        out.add_row(*row)
    return out


def _spectrum(found: Inspection) -> Table:
    out = Table(title="Top singular values", title_justify="left")
    out.add_column("#", justify="right")
    for name in ("σ", "energy", "cumulative", "σ centred", "variance", "cumulative"):
        out.add_column(name, justify="right")
    both = []
    for values in (found.singular_values, found.centred_singular_values):
        share = values.square() / values.square().sum().clamp_min(1e-300)
        both.append(list(zip(values.tolist(), share.tolist(), share.cumsum(0).tolist(), strict=True)))
    for i, pair in enumerate(zip(*both, strict=True)):
        if i < _SHOWN:
            cells = [
                f"{value:.4g}" if j == 0 else f"{100 * value:.2f} %" for side in pair for j, value in enumerate(side)
            ]
            out.add_row(str(i + 1), *cells)
    return out


def plot(name: str, weight: Tensor, found: Inspection, path: Path) -> Path:
    """Left: the rows in the plane of the two leading singular vectors, seen from the origin. Right: the spectrum."""
    plt = pyplot()
    figure, (cone, spectrum) = plt.subplots(1, 2, figsize=(14, 6.2), layout="constrained")
    chosen = torch.randperm(found.rows, generator=torch.Generator().manual_seed(0))[:_POINTS].sort().values
    points = weight[chosen].double() @ found.plane
    dots = cone.scatter(*points.T.numpy(), c=found.norms[chosen].numpy(), s=3, alpha=0.5, cmap="viridis", linewidths=0)
    cone.plot(0, 0, "+", color="red", markersize=16, markeredgewidth=2, label="origin")
    centre = points.mean(0).tolist()
    cone.annotate("", centre, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "red", "linewidth": 1.6})
    cone.plot([], [], color="red", label="mean row")
    figure.colorbar(dots, ax=cone, label="norm of the row").solids.set_alpha(1)
    energy = found.singular_values.square() / found.singular_values.square().sum()
    cone.set_xlabel(f"1st singular direction ({100 * float(energy[0]):.1f} % of the energy)")
    if len(energy) > 1:
        cone.set_ylabel(f"2nd singular direction ({100 * float(energy[1]):.1f} %)")
    shown = "all" if len(chosen) == found.rows else f"{len(chosen):,} of {found.rows:,}"
    cone.set_title(f"The cone: {shown} rows in the plane of the 2-D SVD\nR = {found.cosreg:.6f}")
    cone.set_aspect("equal", adjustable="datalim")
    cone.legend(loc="best", frameon=True)

    order = range(1, found.columns + 1)
    spectrum.plot(order, found.singular_values.numpy(), label="as it is", color="#b9b9b9", linewidth=2.5)
    spectrum.plot(order, found.centred_singular_values.numpy(), label="mean row taken off", color="#1f6fb4")
    spectrum.set(xscale="log", yscale="log", xlabel="rank", ylabel="singular value")
    spectrum.set_title(
        f"Spectrum: effective rank {effective_rank(found.centred_singular_values):.0f} of {found.columns}"
    )
    spectrum.grid(alpha=0.25, which="both")
    spectrum.legend(frameon=False)
    figure.suptitle(f"{plain(name)}, {found.rows:,} × {found.columns:,}", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
    return path
