"""``repdeg-fast inspect``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from repdeg_fast.analysis import inspection, pictures
from repdeg_fast.analysis import weights as checkpoints
from repdeg_fast.analysis.inspection import Inspection
from repdeg_fast.analysis.report import embedding_report, write
from repdeg_fast.analysis.spectrum import directions_for, effective_rank, participation_ratio
from repdeg_fast.bench.suite import dtype_name
from repdeg_fast.cli import outputs
from repdeg_fast.cli.console import progress, stdout

_SHOWN = 10  # singular values in the table


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE[:TENSOR]", help="A safetensors or torch checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the picture goes; default: beside you, named after FILE.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the report too: HTML, JSON and PNGs.", show_default=False)
    ] = None,
) -> None:
    """Say how degenerate an embedding is: R, mean cosine, norms, spectrum, and a picture of its cone (PNG).

    Without TENSOR: the word embedding by the name that model families give it, else the largest matrix.
    """
    pictures.pyplot()
    path, wanted = checkpoints.parse(file)
    picture = out or Path(f"{path.stem}-cone.png")
    outputs.check_picture("out", picture)
    if report:
        outputs.check_folder("report", report)
    name, weight = checkpoints.load(path, wanted)
    with progress(len(weight)) as tick:
        found = inspection.inspect_embedding(weight, lambda rows: tick("reading rows", rows))
        made = embedding_report(name, weight, found, lambda what: tick(what, 0))
        paths = write(made, report, lambda what: tick(what, 0)) if report else []
    console = stdout()
    if wanted is None:
        console.print(f"tensor: {name} (none was named)", soft_wrap=True, markup=False)
    for table in (_overview(name, found), _spectrum(found)):
        console.print(table)
    for sentence in made.findings:
        console.print(f"- {sentence}", soft_wrap=True, markup=False)
    if report:
        console.print(f"report: {paths[0]}, {paths[1].name} and pictures", soft_wrap=True, markup=False)
    pictures.plot_cone(name, weight, found, picture)
    console.print(f"picture: {picture}", soft_wrap=True, markup=False)


def _overview(name: str, found: Inspection) -> Table:
    title = f"{name}: {found.rows:,} × {found.columns:,} {dtype_name(found.dtype)}"
    out = Table(title=escape(title), title_justify="left")
    out.add_column("measure", no_wrap=True)
    out.add_column("value", justify="right", no_wrap=True)
    out.add_column("meaning", style="dim")
    norms, centred = found.norms, found.centred_singular_values
    small, large = float(norms.min()), float(norms.max())
    rows = [
        ("R (CosReg)", f"{found.cosreg:.12f}", "mean cosine over all N² ordered pairs, the diagonal left out"),
        (
            "mean cosine",
            "–" if math.isnan(found.mean_cosine) else f"{found.mean_cosine:.6f}",
            "over pairs of different non-zero rows; 0: no common direction",
        ),
        ("‖mean unit row‖", f"{found.mean_direction_norm:.6f}", "0: rows in all directions; 1: all in one"),
        ("norms", f"{small:.4g} / {float(norms.median()):.4g} / {large:.4g}", "min / median / max"),
        ("zero rows", f"{found.zero_rows:,}", "padding, or tokens that were never trained"),
        (
            "effective rank",
            f"{effective_rank(centred):.1f}",
            f"of the centred rows, RankMe; at most {found.columns:,}",
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
