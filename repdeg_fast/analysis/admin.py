"""The tables of ``initialize_admin_`` and ``residual_dependency`` in files: as JSON or CSV, and as pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from repdeg_fast.nn.admin.table import AdminTable, DependencyTable


def save_table(table: AdminTable | DependencyTable, path: str | Path) -> Path:
    """Write the records as a list of objects (``.json``) or as lines with a header (``.csv``); returns the path."""
    _check_table(table)
    path = Path(path)
    rows = [asdict(record) for record in table.records]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(table.records[0])])
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise ValueError(f"path: expected a name that ends in .json or .csv, got {str(path)!r}")
    return path


def plot_table(table: AdminTable | DependencyTable, path: str | Path) -> Path:
    """Draw the table into a picture file (PNG, PDF, SVG by its ending), a panel a stack; returns the path. Needs
    matplotlib."""
    _check_table(table)
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("plot_table needs matplotlib; pip install matplotlib") from missing
    figure = Figure(figsize=(6.0 * len(table.stacks()), 4.5), layout="constrained")
    for axes, stack in zip(figure.subplots(1, len(table.stacks()), squeeze=False)[0], table.stacks(), strict=True):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if isinstance(table, AdminTable):
            _draw_omegas(table, axes, stack)
        else:
            _draw_shares(table, axes, figure, stack)
        axes.set_title(stack or "model")
    figure.savefig(path, dpi=120)
    return Path(path)


def _draw_omegas(table: AdminTable, axes: Any, stack: str) -> None:
    rows = [record for record in table.records if record.stack == stack]
    places = range(1, len(rows) + 1)
    if rows[0].branch_variance is not None:
        axes.bar(places, [row.branch_variance for row in rows], color="tab:orange", alpha=0.6, label="Var f")
    axes.plot(places, [row.omega for row in rows], marker=".", label="ω")
    axes.set_xlabel("sub-layer")
    axes.legend()


def _draw_shares(table: DependencyTable, axes: Any, figure: Any, stack: str) -> None:
    matrix = table.matrix(stack)
    width = len(matrix[-1])
    shares = [[s.share for s in row] + [float("nan")] * (width - len(row)) for row in matrix]
    image = axes.imshow(shares, vmin=0, extent=(-0.5, width - 0.5, len(matrix) + 0.5, 0.5), aspect="auto")
    axes.set_xlabel("source: 0 the input, j the branch of sub-layer j")
    axes.set_ylabel("output of sub-layer")
    figure.colorbar(image, ax=axes, label="share of the variance")


def _check_table(table: Any) -> None:
    if not isinstance(table, (AdminTable, DependencyTable)):
        raise TypeError(
            "table: expected what initialize_admin_ or residual_dependency returned, an AdminTable or "
            f"DependencyTable, got {type(table).__name__}"
        )
