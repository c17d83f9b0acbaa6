"""What ADMIN's initialization did and measured, as data; :mod:`repdeg_fast.analysis` saves and draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sublayer:
    """One residual block: ω (the mean, where its entries differ) and, where a batch was looked at, the variances of
    the stream ω ⊙ x and of the branch f, which dropout is part of."""

    stack: str
    name: str
    omega: float
    stream_variance: float | None = None
    branch_variance: float | None = None


@dataclass(frozen=True)
class Share:
    """``share`` of the variance of sub-layer ``name``'s output comes from ``source``: a sub-layer's branch up to it,
    or the input of the stack."""

    stack: str
    name: str
    source: str
    share: float


class Table:
    """Records, all of one dataclass. As a sequence it is that of its records."""

    records: Sequence[Any]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> Any:
        return self.records[place]

    def stacks(self) -> list[str]:
        """The stacks, in the order of their first sub-layers."""
        return list(dict.fromkeys(record.stack for record in self.records))


@dataclass(frozen=True)
class AdminTable(Table):
    """What :func:`repdeg_fast.initialize_admin_` did: for each sub-layer ω and, under ``profile``, the variances."""

    rule: str
    records: Sequence[Sublayer]

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "–" if value is None else f"{value:.4g}"

        rows = [("sub-layer", "Var ω⊙x", "Var f", "ω")]
        rows += [(r.name, number(r.stream_variance), number(r.branch_variance), number(r.omega)) for r in self.records]
        return f"ADMIN, rule {self.rule!r}\n{_aligned(rows)}"


@dataclass(frozen=True)
class DependencyTable(Table):
    """What :func:`repdeg_fast.residual_dependency` found: one record for each sub-layer and source up to it."""

    records: Sequence[Share]

    def output(self, stack: str) -> list[Share]:
        """How much of the output of ``stack`` its input and each of its branches explain; the shares add up to 1."""
        return self.matrix(stack)[-1]

    def matrix(self, stack: str) -> list[list[Share]]:
        """One row a sub-layer, in the order of execution: the input first, then the branches up to that sub-layer."""
        rows: dict[str, list[Share]] = {}
        for record in self.records:
            if record.stack == stack:
                rows.setdefault(record.name, []).append(record)
        if not rows:
            raise ValueError(f"stack: expected one of {', '.join(map(repr, self.stacks()))}, got {stack!r}")
        return list(rows.values())

    def __str__(self) -> str:
        blocks = []
        for stack in self.stacks():
            rows = [("source", "share of the output"), *((s.source, f"{s.share:.4f}") for s in self.output(stack))]
            blocks.append(f"{stack or 'model'}\n{_aligned(rows)}")
        return "\n\n".join(blocks)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
