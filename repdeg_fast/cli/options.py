"""Options that several commands have, and what their text stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.table import Table

from repdeg_fast._checks import InputError
from repdeg_fast.analysis import inspection
from repdeg_fast.analysis import weights as checkpoints
from repdeg_fast.bench import measure
from repdeg_fast.bench.report import plain_table
from repdeg_fast.bench.suite import DTYPES, Selection, suites
from repdeg_fast.native import build

_COPIES = 3  # of real weights, at least: the leaf, its gradient, and one in float64 a part at a time


Ops = Annotated[
    str, typer.Option(metavar="A,B", help=f"Operations ({', '.join(suites())}); default: all.", show_default=False)
]
Cases = Annotated[
    str,
    typer.Option(
        metavar="A,B", help="Default: some that suit the device. `bench --list` shows all.", show_default=False
    ),
]
Providers = Annotated[
    str,
    typer.Option(metavar="A,B", help="Implementations; default: all. `bench --list` shows them.", show_default=False),
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is one.", show_default=False)]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", help=f"{', '.join(DTYPES)}; default: each case's own.", show_default=False)
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="FILE[:TENSOR]",
        help="Real weights as a case, from a safetensors or torch checkpoint; beside the cases named by --cases, else"
        " instead of the default ones. Without TENSOR: the word embedding, else the largest matrix.",
        show_default=False,
    ),
]


def device_of(name: str) -> torch.device:
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: cuda is not there: {build.unavailable('cuda')}")
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: got {name!r}; there are cpu and cuda (CUDA_VISIBLE_DEVICES chooses among several)")
    return torch.device(name)


def with_weights(selections: list[Selection], specification: str, cases: str) -> list[Selection]:
    """The selections with the named tensor as one more case, or the only one where no case was named."""
    if not specification:
        return selections
    name, weight = checkpoints.load(*checkpoints.parse(specification))
    free = measure.free_bytes(torch.device("cpu"))
    if _COPIES * weight.nbytes > free:
        raise InputError(
            f"weights: {name} has {weight.nbytes / 1e9:.1f} GB, and to measure with it takes {_COPIES} times as much;"
            f" {free / 1e9:.1f} GB of memory are free"
        )
    inspection.check_finite(weight, name)
    made = [(s, s.suite.case_of_weights(name, weight)) for s in selections]
    fitting = [(s, case) for s, case in made if not case.unavailable]
    if not fitting:
        raise InputError(f"weights: {made[0][1].unavailable}")
    return [replace(s, cases=[*(s.cases if cases else []), case]) for s, case in fitting]


def with_dtype(selection: Selection, dtype: str) -> Selection:
    if not dtype:
        return selection
    if dtype not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}; there are {', '.join(DTYPES)}")
    return replace(selection, cases=[replace(case, dtype=DTYPES[dtype]) for case in selection.cases])


def names(listed: str) -> list[str]:
    """``"A, B"`` → A and B; nothing for nothing."""
    found = [name.strip() for name in listed.split(",") if name.strip()]
    if listed and not found:
        raise InputError(f"expected names with commas between them, got {listed!r}")
    return found


def catalogue() -> Table:
    """Every operation with its cases and providers."""
    out = plain_table("What can be measured", "bold: the case that runs on a CPU unless asked for more")
    for name in ("operation", "cases", "providers"):
        out.add_column(name, no_wrap=name == "operation")
    for op, suite in suites().items():
        brief = {case.group or case.name: case.brief for case in suite.cases}
        cases = ", ".join(f"[bold]{name}[/]" if bold else name for name, bold in brief.items())
        out.add_row(op, cases, ", ".join(provider.name for provider in suite.providers), end_section=True)
    return out
