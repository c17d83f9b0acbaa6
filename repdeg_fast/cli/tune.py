"""``repdeg-fast tune``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from repdeg_fast import backends
from repdeg_fast._checks import InputError
from repdeg_fast.bench import report
from repdeg_fast.bench import tune as tuner
from repdeg_fast.bench.suite import select
from repdeg_fast.cli import options, outputs
from repdeg_fast.cli.console import stdout
from repdeg_fast.cli.options import Cases, Dtype, Ops
from repdeg_fast.native import build


def tune(
    ops: Ops = "",
    cases: Cases = "",
    dtype: Dtype = "",
    json: Annotated[Path | None, typer.Option(help="Write every trial to this file, as they come.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each configuration, about.")] = 1.0,
) -> None:
    """Find the fastest launch configurations of the Triton kernels for this GPU, and use them from now on.

    They are kept in tuning.json in the cache folder; delete it to return to those that ship.
    """
    target = options.device_of("")
    if target.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # where it finds nothing of use, but runs
        raise InputError(f"tune: needs a GPU: {build.unavailable('cuda')}")
    if json:
        outputs.check_file("json", json)
    selections = [options.with_dtype(s, dtype) for s in select(options.names(ops), options.names(cases), (), target)]
    console, trials = stdout(), []
    for found in tuner.tune(selections, target, tuner.median_timer(target, seconds), backends.tuning_file()):
        console.print(_table(found))
        trials += found
        if json:
            report.write_rows([trial.as_json() for trial in trials], json)
    console.print(f"configurations: {backends.tuning_file()}", soft_wrap=True, markup=False)


def _table(trials: Sequence[tuner.Trial]) -> Table:
    chosen = tuner.fastest(trials)
    out = Table("configuration", "ms", "", title=trials[0].question, title_justify="left")
    for trial in trials:
        values = ", ".join(f"{name} {value}" for name, value in asdict(trial.configuration).items())
        remark = trial.reason or ("chosen" if trial.configuration == chosen else "")
        out.add_row(values, "–" if trial.ms is None else f"{trial.ms:.4g}", remark)
    return out
