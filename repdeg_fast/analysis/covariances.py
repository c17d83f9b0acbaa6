"""What the similarities of representations are computed from: their moments, accumulated in a stream in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from repdeg_fast import _ranks
from repdeg_fast._checks import not_a_tensor

CHUNK = 4096  # points in float64 at a time
_PANEL = 128  # columns of a product that is symmetric: narrower ones would save more and multiply slower


class Covariances:
    """Moments of one or several representations ("sides") of the same points; the points need not fit in memory.

    Example::

        covariances = Covariances()
        for x, y in batches:
            covariances.update(x, y)  # x (n, d), y (n, e): row i of both is the same point
        pwcca(covariances)

    A side is a layer, say, or the same layer of two models. For sides a ≤ b it keeps the one matrix Σ g_a g_bᵀ with
    g = (1, x − o, ‖x − o‖²), a (d + 2)×(e + 2) matrix in float64: sums, products, and what unbiased CKA needs of
    third and fourth order. The origin o of a side is the mean of its first chunk, so that a large mean costs no
    digits; to move it is linear in g, which makes merging exact.

    Args:
        names: Of the sides, for errors; default x and y, or "side 0" ….
        band: Pairs of sides further apart than this are not kept: 1 for consecutive layers. Default: all pairs are.
    """

    def __init__(self, names: Sequence[str] | None = None, band: int | None = None):
        self.names = tuple(names) if names is not None else ()
        self.band = band
        self.points = 0
        self._origins: list[Tensor] = []
        self._moments: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        """The number of sides."""
        return len(self._origins)

    def columns(self, side: int = 0) -> int:
        return len(self.mean(side))

    def update(self, *sides: Tensor) -> Covariances:
        """Adds points: a matrix (n, d) of any floating dtype a side, all with equal n. Returns itself."""
        self._check(sides)
        for chunks in zip(*(side.detach().split(CHUNK) for side in sides), strict=True):
            if len(chunks[0]) == 0:
                continue
            if not self._origins:
                self._start([chunk.mean(0, dtype=torch.float64) for chunk in chunks])
            features = [_features(chunk, origin) for chunk, origin in zip(chunks, self._origins, strict=True)]
            for (i, j), moments in self._moments.items():
                if i == j:
                    _add_gram(moments, features[i])
                else:
                    moments.addmm_(features[i].T, features[j])
            self.points += len(chunks[0])
        return self

    def merge(self, other: Covariances) -> Covariances:
        """Adds the points of another process or file; ``other`` stays as it is. Returns itself."""
        if not other._origins:
            return self
        if not self._origins:
            self.names, self.band = self.names or other.names, other.band
            self._start([torch.zeros_like(origin) for origin in other._origins])
            self._origins = [origin.clone() for origin in other._origins]
        if [len(origin) for origin in self._origins] != [len(origin) for origin in other._origins]:
            raise ValueError(f"other: expected sides of {self._widths()} columns as here, got {other._widths()}")
        for (i, j), moments in self._moments.items():
            theirs = other._moments[i, j].to(moments.device)
            theirs = _moved(theirs, self._shift(other, i))
            moments += _moved(theirs.T, self._shift(other, j)).T
        self.points += other.points
        return self

    def merge_ranks(self, group: Any = None) -> Covariances:
        """On all ranks of ``torch.distributed`` at once: adds the points of the others, so that each has those of all.
        Returns itself."""
        ranks = _ranks.number(group)
        if ranks == 1:
            return self
        mine = (self.points, [origin.cpu() for origin in self._origins], self.names, self.band)
        told: list[Any] = [None] * ranks
        distributed.all_gather_object(told, mine, group=group)
        origins, names, band = next((one[1:] for one in told if one[1]), ([], self.names, self.band))
        if any(one[1] and [len(o) for o in one[1]] != [len(o) for o in origins] for one in told):
            raise ValueError(
                f"sides: expected the same columns on all ranks, got {[[*map(len, o)] for _, o, *_ in told]}"
            )
        if not origins:
            return self
        device = self._origins[0].device if self._origins else torch.device("cpu")
        common = Covariances(names, band)
        common._start([origin.to(device) for origin in origins])
        common.merge(self)
        for moments in common._moments.values():
            distributed.all_reduce(moments, group=group)
        self.points, self.names, self.band = sum(one[0] for one in told), names, band
        self._origins, self._moments = common._origins, common._moments
        return self

    def of(self, *sides: int) -> Covariances:
        """The same points seen from some of the sides, in the order named; shares memory with these."""
        for side in sides:
            if not 0 <= side < len(self):
                raise ValueError(f"sides: got {side}; there are 0 … {len(self) - 1}")
        out = Covariances([self.name(side) for side in sides])
        out.points, out._origins = self.points, [self._origins[side] for side in sides]
        for i, first in enumerate(sides):
            for j in range(i, len(sides)):
                if self._is_kept(first, sides[j]):
                    out._moments[i, j] = self._block(first, sides[j])
        return out

    def name(self, side: int) -> str:
        return (self.names or _default_names(len(self)))[side]

    def mean(self, side: int = 0) -> Tensor:
        """(d,)"""
        total = self._block(side, side)[0, 1:-1]
        return self._origins[side] + total / self.points

    def scatter(self, first: int = 0, second: int | None = None) -> Tensor:
        """(d, e): Σ (x − mean)(y − mean)ᵀ over the points; of a side with itself where ``second`` is left out."""
        moments = self._block(first, first if second is None else second)
        return moments[1:-1, 1:-1] - torch.outer(moments[1:-1, 0], moments[0, 1:-1]) / self.points

    def second_moment(self, side: int = 0) -> Tensor:
        """(d, d): Σ x xᵀ, about zero."""
        mean = self.mean(side)
        return self.scatter(side) + self.points * torch.outer(mean, mean)

    def unbiased_hsic(self, first: int, second: int) -> float:
        """n(n − 3) times Song et al.'s unbiased estimate of HSIC with linear kernels, without an n×n matrix.

        tr(K̃L̃) + ΣK̃·ΣL̃/((n−1)(n−2)) − 2/(n−2)·1ᵀK̃L̃1, where K̃ = XXᵀ without its diagonal. Any origin gives the
        same.
        """
        n, moments = self.points, self._block(first, second)
        sum_x, sum_a = moments[1:-1, 0], moments[-1, 0]  # a = ‖x‖²
        sum_y, sum_b = moments[0, 1:-1], moments[0, -1]
        products, sum_xb, sum_ay, sum_ab = moments[1:-1, 1:-1], moments[1:-1, -1], moments[-1, 1:-1], moments[-1, -1]
        trace = products.square().sum() - sum_ab
        totals = (sum_x.square().sum() - sum_a) * (sum_y.square().sum() - sum_b)
        rows = sum_x @ products @ sum_y - sum_x @ sum_xb - sum_ay @ sum_y + sum_ab
        return float(trace + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows)

    def _block(self, first: int, second: int) -> Tensor:
        if not self._origins:
            raise ValueError("covariances: expected points, got none; call update first")
        for side in (first, second):
            if not 0 <= side < len(self):
                raise ValueError(f"sides: got {side}; there are 0 … {len(self) - 1}")
        pair = min(first, second), max(first, second)
        if pair not in self._moments:
            raise ValueError(
                f"sides: {self.name(first)} and {self.name(second)} are further apart than was kept (band)"
            )
        return self._moments[pair] if first <= second else self._moments[pair].T

    def _is_kept(self, first: int, second: int) -> bool:
        return self.band is None or abs(first - second) <= self.band

    def _start(self, origins: list[Tensor]) -> None:
        self._origins = origins
        for i, first in enumerate(origins):
            for j in range(i, len(origins)):
                if self._is_kept(i, j):
                    self._moments[i, j] = first.new_zeros(len(first) + 2, len(origins[j]) + 2)

    def _shift(self, other: Covariances, side: int) -> Tensor:
        return self._origins[side] - other._origins[side].to(self._origins[side].device)

    def _widths(self) -> list[int]:
        return [len(origin) for origin in self._origins]

    def _check(self, sides: Sequence[Tensor]) -> None:
        if not sides:
            raise ValueError("sides: expected at least one matrix of points, got none")
        if self.names and len(self.names) != len(sides):
            raise ValueError(f"sides: expected {len(self.names)} ({', '.join(self.names)}), got {len(sides)}")
        if self._origins and [side.shape[-1] for side in sides] != self._widths():
            got = [side.shape[-1] for side in sides]
            raise ValueError(f"sides: expected matrices of {self._widths()} columns as before, got {got}")
        names = self.names or _default_names(len(sides))
        for name, side in zip(names, sides, strict=True):
            check_points(name, side)
            if len(side) != len(sides[0]):
                raise ValueError(f"{name}: expected {len(sides[0])} points as in {names[0]}, got {len(side)}")


def _default_names(sides: int) -> tuple[str, ...]:
    return ("x", "y")[:sides] if sides <= 2 else tuple(f"side {i}" for i in range(sides))


def check_points(name: str, points: Tensor) -> None:
    """``points`` is a matrix (n, d) of finite floating numbers."""
    if not isinstance(points, Tensor):
        raise not_a_tensor(name, points)
    if points.dim() != 2 or points.shape[1] == 0 or not points.is_floating_point():
        raise ValueError(f"{name}: expected a floating matrix (points, d), got {points.dtype} {tuple(points.shape)}")
    for start, rows in zip(range(0, len(points), CHUNK), points.split(CHUNK), strict=False):
        if not torch.isfinite(rows.sum()):  # a cheap look; then a close one, since finite values can overflow a sum
            bad = ~torch.isfinite(rows).all(1)
            if bad.any():
                first = start + int(bad.nonzero()[0])
                raise ValueError(f"{name}: expected finite values, got NaN or Inf, first in point {first}")


def paired(x: Tensor | Covariances, y: Tensor | None, least: int = 2) -> Covariances:
    """What two-sided measures take, ``(x, y)`` or one ``Covariances`` of two sides, as the latter."""
    if not isinstance(x, Covariances):
        if y is None:
            raise ValueError("y: expected a second matrix, or Covariances of two sides as the only argument")
        x = Covariances().update(x, y)
    elif y is not None:
        raise ValueError("y: expected nothing beside Covariances, which have both sides")
    if len(x) != 2 and x.points:
        raise ValueError(f"covariances: expected two sides, got {len(x)}; covariances.of(i, j) chooses")
    if x.points < least:
        raise ValueError(f"points: expected at least {least}, got {x.points}")
    return x


def check_varies(covariances: Covariances, side: int) -> None:
    """Raises ValueError where all points of a side are the same."""
    mean = covariances.mean(side)
    if float(covariances.scatter(side).trace()) <= 1e-28 * covariances.points * float(mean.square().sum()):
        raise ValueError(f"{covariances.name(side)}: all its {covariances.points} points are the same, nothing varies")


def _features(points: Tensor, origin: Tensor) -> Tensor:
    """(n, d + 2) in float64: 1, x − o, ‖x − o‖²."""
    out = origin.new_ones(len(points), points.shape[1] + 2)
    torch.sub(points, origin, out=out[:, 1:-1])
    torch.linalg.vector_norm(out[:, 1:-1], dim=1, out=out[:, -1])
    out[:, -1].square_()
    return out


def _add_gram(moments: Tensor, features: Tensor) -> None:
    """moments += gᵀg, of which only the panels on and above the diagonal are computed: the rest is their mirror."""
    for start in range(0, len(moments), _PANEL):
        end = start + _PANEL
        strip = moments[start:end, start:]
        strip.addmm_(features[:, start:end].T, features[:, start:])
        moments[end:, start:end] = strip[:, _PANEL:].T


def _moved(moments: Tensor, shift: Tensor) -> Tensor:
    """Σ g hᵀ with the origin of g moved by ``shift``: x' = x − s and ‖x'‖² = ‖x‖² − 2 s·x + ‖s‖² are linear in g."""
    out = moments.clone()
    out[1:-1] -= torch.outer(shift, moments[0])
    out[-1] += shift.square().sum() * moments[0] - 2 * shift @ moments[1:-1]
    return out
