"""Tables of what ADMIN's initialization did and measured: printed, saved as JSON or CSV, plotted."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
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


class _Table(ABC):
    """What a table can do with its records, all of one dataclass. As a sequence it is that of its records."""

    records: Sequence[Any]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> Any:
        return self.records[place]

    def save(self, path: str | Path) -> Path:
        """Write the records as a list of objects (``.json``) or as lines with a header (``.csv``)."""
        path = Path(path)
        rows = [asdict(record) for record in self.records]
        if path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(self.records[0])])
                writer.writeheader()
                writer.writerows(rows)
        else:
            raise ValueError(f"path: expected a name that ends in .json or .csv, got {str(path)!r}")
        return path

    def plot(self, path: str | Path) -> Path:
        """Draw the table into a picture file (PNG, PDF, SVG by its ending). Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as missing:
            raise ImportError("plot needs matplotlib; pip install matplotlib") from missing
        figure = Figure(figsize=(6.0 * len(self.stacks()), 4.5), layout="constrained")
        for axes, stack in zip(figure.subplots(1, len(self.stacks()), squeeze=False)[0], self.stacks(), strict=True):
            axes.xaxis.get_major_locator().set_params(integer=True)
            self._draw(axes, figure, stack)
            axes.set_title(stack or "model")
        figure.savefig(path, dpi=120)
        return Path(path)

    def stacks(self) -> list[str]:
        """The stacks, in the order of their first sub-layers."""
        return list(dict.fromkeys(record.stack for record in self.records))

    @abstractmethod
    def _draw(self, axes: Any, figure: Any, stack: str) -> None: ...


@dataclass(frozen=True)
class AdminTable(_Table):
    """What :func:`repdeg_fast.initialize_admin_` did: for each sub-layer ω and, under ``profile``, the variances."""

    rule: str
    records: Sequence[Sublayer]

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "–" if value is None else f"{value:.4g}"

        rows = [("sub-layer", "Var ω⊙x", "Var f", "ω")]
        rows += [(r.name, number(r.stream_variance), number(r.branch_variance), number(r.omega)) for r in self.records]
        return f"ADMIN, rule {self.rule!r}\n{_aligned(rows)}"

    def _draw(self, axes: Any, figure: Any, stack: str) -> None:
        rows = [record for record in self.records if record.stack == stack]
        places = range(1, len(rows) + 1)
        if rows[0].branch_variance is not None:
            axes.bar(places, [row.branch_variance for row in rows], color="tab:orange", alpha=0.6, label="Var f")
        axes.plot(places, [row.omega for row in rows], marker=".", label="ω")
        axes.set_xlabel("sub-layer")
        axes.legend()


@dataclass(frozen=True)
class DependencyTable(_Table):
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

    def _draw(self, axes: Any, figure: Any, stack: str) -> None:
        matrix = self.matrix(stack)
        width = len(matrix[-1])
        shares = [[s.share for s in row] + [float("nan")] * (width - len(row)) for row in matrix]
        image = axes.imshow(shares, vmin=0, extent=(-0.5, width - 0.5, len(matrix) + 0.5, 0.5), aspect="auto")
        axes.set_xlabel("source: 0 the input, j the branch of sub-layer j")
        axes.set_ylabel("output of sub-layer")
        figure.colorbar(image, ax=axes, label="share of the variance")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
