"""``repdeg-fast bench | profile | tune | inspect | info``."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from repdeg_fast import __version__, backends
from repdeg_fast.bench import inspection, measure, outputs, plots, report, runner
from repdeg_fast.bench import profile as profiling
from repdeg_fast.bench import tune as tuner
from repdeg_fast.bench import weights as checkpoints
from repdeg_fast.bench.suite import DTYPES, InputError, Selection, Suite, select, suites
from repdeg_fast.native import build

app = typer.Typer(
    help="Fused kernels for language-model pretraining: measure their speed and memory, and look at embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_WIDTH = 170  # columns that the widest table needs; a pipe has no width of its own


def _listing(names_of: Callable[[Suite], Iterable[str | None]]) -> str:
    return "; ".join(
        f"{op}: {', '.join(dict.fromkeys(filter(None, names_of(suite))))}" for op, suite in suites().items()
    )


CASE_HELP = _listing(lambda suite: (case.group or case.name for case in suite.cases))
PROVIDER_HELP = _listing(lambda suite: (provider.name for provider in suite.providers))

Ops = Annotated[
    str, typer.Option(metavar="A,B", help=f"Operations ({', '.join(suites())}); default: all.", show_default=False)
]
Cases = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help=f"Default: some that suit the device; on a CPU no sweep. Of {CASE_HELP}.",
        show_default=False,
    ),
]
Providers = Annotated[
    str, typer.Option(metavar="A,B", help=f"Implementations; default: all. Of {PROVIDER_HELP}.", show_default=False)
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is one.", show_default=False)]
Dtype = Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Default: each case's own.", show_default=False)]
Weights = Annotated[
    str,
    typer.Option(
        metavar="FILE[:TENSOR]",
        help="Real weights as a case, from a safetensors or torch checkpoint; beside the cases named by --cases, else"
        " instead of the default ones. Without TENSOR: the word embedding, else the largest matrix.",
        show_default=False,
    ),
]


def main() -> None:
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"repdeg-fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Exits with 1 if a value is wrong or one of our own providers fails, with 2 on bad input.")
def bench(
    ops: Ops = "",
    cases: Cases = "",
    providers: Providers = "",
    device: Device = "",
    dtype: Dtype = "",
    weights: Weights = "",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file, after each case.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots (PNG) into this folder.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each provider and pass of a case, about.")] = 0.5,
) -> None:
    """Measure operations against their peers, side by side: time, share of the roof, memory, and the value."""
    with _clear_errors():
        target = _device(device)
        if not math.isfinite(seconds):
            raise InputError(f"seconds: got {seconds}; expected a finite number")
        if json:
            outputs.check_file("json", json)
        if plot:
            outputs.check_folder("plot", plot)
            plots.pyplot()  # a missing matplotlib must not show after minutes of measuring
        selections = _with_weights(select(_names(ops), _names(cases), _names(providers), target), weights, cases)
        selections = [_with_dtype(selection, dtype) for selection in selections]
        rows = _run(selections, target, seconds, json)
        console = _console(_WIDTH)
        report.print_notes(console, rows)
        for op in dict.fromkeys(row.suite.op for row in rows) if plot else ():
            for path in plots.plot_run([row for row in rows if row.suite.op == op], plot or Path()):
                console.print(f"plot: {path}", soft_wrap=True, markup=False)
        if json:
            console.print(f"figures: {json}", soft_wrap=True, markup=False)
    if any(row.wrong or (row.failed and row.provider.ours) for row in rows):
        raise typer.Exit(1)


def _run(selections: list[Selection], device: torch.device, seconds: float, json: Path | None) -> list[runner.Row]:
    console, rows = _console(_WIDTH), []
    with _progress(sum(runner.count_ticks(s.cases, s.providers) for s in selections)) as tick:
        for selection in selections:
            for found in runner.run(selection.suite, selection.cases, selection.providers, device, seconds, tick):
                rows += found
                if found[0].case.group is None:
                    console.print(report.table(found))
                if json:
                    report.write_json(rows, json)
            for group in dict.fromkeys(case.group for case in selection.cases if case.group):
                of_group = [row for row in rows if (row.suite, row.case.group) == (selection.suite, group)]
                console.print(report.sweep_table(of_group))
    return rows


@app.command()
def profile(
    op: Annotated[str, typer.Option(help=f"The operation: {', '.join(suites())}.")],
    case: Annotated[str, typer.Option(help=f"Default: the first. Of {CASE_HELP}.", show_default=False)] = "",
    provider: Providers = "",
    device: Device = "",
    dtype: Dtype = "",
    weights: Weights = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the plot and snapshots.")] = Path("bench_out"),
) -> None:
    """Show where the memory of one step goes: a table by phase, and a timeline of the allocated bytes (PNG).

    On CUDA also one snapshot a provider for PyTorch's memory viewer (https://pytorch.org/memory_viz).
    """
    with _clear_errors():
        target = _device(device)
        outputs.check_folder("out", out)
        plots.pyplot()
        selections = _with_weights(select([op], _names(case), _names(provider), target), weights, case)
        selection = _with_dtype(selections[0], dtype)
        out.mkdir(parents=True, exist_ok=True)
        console = _console(_WIDTH)
        for chosen in selection.cases if case or weights else selection.cases[:1]:
            with _progress(len(selection.providers)) as tick:
                profiles = profiling.profile_case(selection.suite, chosen, selection.providers, target, out, tick)
            console.print(profiling.table(selection.suite, chosen, profiles, target))
            timelines = {p.provider.name: p.timeline for p in profiles if p.timeline}
            if timelines:
                path = out / f"{op}-{outputs.file_name(chosen.name)}-timeline.png"
                title = f"{op}: bytes beyond the inputs on {target.type}\n{chosen}"
                console.print(f"timeline: {plots.plot_timelines(timelines, title, path)}", soft_wrap=True, markup=False)
            for found in profiles:
                if found.snapshot:
                    console.print(f"snapshot: {found.snapshot}", soft_wrap=True, markup=False)


@app.command()
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
    with _clear_errors():
        if not torch.cuda.is_available():
            raise InputError(f"tune: needs a GPU: {build.unavailable('cuda')}")
        target = torch.device("cuda")
        if json:
            outputs.check_file("json", json)
        selections = [_with_dtype(s, dtype) for s in select(_names(ops), _names(cases), (), target)]
        console, trials = _console(), []
        for found in tuner.tune(selections, target, tuner.median_timer(target, seconds), backends.tuning_file()):
            console.print(tuner.table(found))
            trials += found
            if json:
                report.write_rows([trial.as_json() for trial in trials], json)
        console.print(f"configurations: {backends.tuning_file()}", soft_wrap=True, markup=False)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE[:TENSOR]", help="A safetensors or torch checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the picture goes; default: beside you, named after FILE.")
    ] = None,
) -> None:
    """Say how degenerate an embedding is: R, mean cosine, norms, spectrum, and a picture of its cone (PNG).

    Without TENSOR: the word embedding by the name that model families give it, else the largest matrix.
    """
    with _clear_errors():
        plots.pyplot()
        path, wanted = checkpoints.parse(file)
        picture = out or Path(f"{path.stem}-cone.png")
        outputs.check_file("out", picture)
        name, weight = checkpoints.load(path, wanted)
        with _progress(len(weight)) as tick:
            found = inspection.inspect_embedding(weight, lambda rows: tick("reading rows", rows))
        console = _console()
        if wanted is None:
            console.print(f"tensor: {name} (none was named)", soft_wrap=True, markup=False)
        for table in inspection.tables(name, found):
            console.print(table)
        inspection.plot(name, weight, found, picture)
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)


@app.command()
def info(
    compile_now: Annotated[
        bool, typer.Option("--build", help="Compile the C++ and CUDA kernels now, ahead of time.")
    ] = False,
) -> None:
    """Show versions, devices, how the kernels were built, and which backend serves each operation and why."""
    console = _console()
    failed = _build(console) if compile_now else False
    console.print(_environment_table())
    console.print(_libraries_table())
    console.print(_backends_table())
    if failed:
        raise typer.Exit(1)


def _build(console: Console) -> bool:
    """Compile what this machine can use; true if something that should have compiled did not."""
    failed = False
    for library in build.LIBRARIES:
        if reason := build.unavailable(library):
            console.print(f"{library} kernels: not compiled: {reason}", markup=False)
            continue
        try:
            build.load(library)
            console.print(f"{library} kernels: compiled", markup=False)
        except RuntimeError as error:
            failed = True
            console.print(f"{library} kernels: {error}", markup=False)
    return failed


def _environment_table() -> Table:
    cpu = torch.device("cpu")
    facts = {
        key: value for key, value in measure.versions(cpu).items() if key not in ("date", "device_name", "threads")
    }
    facts["platform"] = platform.platform()
    facts["CPU"] = (
        f"{measure.device_name(cpu)}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"{measure.free_bytes(cpu) / 1e9:.0f} GB free"
    )
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 1e9:.0f} GB"
        )
    if not torch.cuda.is_available():
        facts["cuda devices"] = build.unavailable("cuda")
    table = Table("", "", title="Environment", title_justify="left", show_header=False)
    for key, value in facts.items():
        table.add_row(key, escape(str("–" if value is None else value)))
    return table


def _libraries_table() -> Table:
    table = Table("library", "state", "build", title="Native kernels", title_justify="left")
    for library in build.LIBRARIES:
        state = build.state(library)
        built = build.build_info(library) if state in ("loaded", "compiled") else {}
        table.add_row(
            library, escape(state), escape("\n".join(f"{key}: {value}" for key, value in built.items() if value))
        )
    table.caption = escape(f"sources: {build.source_root()}; cache: {build.cache_root()}")
    return table


def _backends_table() -> Table:
    table = Table("operation", "device", "served by", "others", title="Backends", title_justify="left")
    for op, devices in backends.status().items():
        for device, entry in devices.items():
            others = [f"{name}: {entry[name] or 'can serve'}" for name in backends.BACKENDS if name != entry["serves"]]
            reason = entry[str(entry["serves"])]  # one that was named may be unable to
            serves = f"[bold]{entry['serves']}[/]" + (f" (cannot serve: {escape(reason)})" if reason else "")
            table.add_row(op, device, serves, escape("\n".join(others)))
    table.caption = "REPDEG_FAST_BACKEND or repdeg_fast.use_backend(name) name one instead"
    return table


def _device(name: str) -> torch.device:
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: cuda is not there: {build.unavailable('cuda')}")
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: got {name!r}; there are cpu and cuda (CUDA_VISIBLE_DEVICES chooses among several)")
    return torch.device(name)


def _with_weights(selections: list[Selection], specification: str, cases: str) -> list[Selection]:
    """The selections with the named tensor as one more case, or the only one where no case was named."""
    if not specification:
        return selections
    name, weight = checkpoints.load(*checkpoints.parse(specification))
    inspection.check_finite(weight, name)
    return [replace(s, cases=[*(s.cases if cases else []), s.suite.case_of_weights(name, weight)]) for s in selections]


def _with_dtype(selection: Selection, dtype: str) -> Selection:
    if not dtype:
        return selection
    if dtype not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}; there are {', '.join(DTYPES)}")
    return replace(selection, cases=[replace(case, dtype=DTYPES[dtype]) for case in selection.cases])


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _console(least: int = 0) -> Console:
    """At least so wide: a terminal that is narrower breaks the lines of a table, but no figure is lost."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, least if console.is_terminal else _WIDTH))


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr, so that the tables on stdout can be piped."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda text, steps=1: progress.update(task, advance=steps, description=escape(text))


@contextmanager
def _clear_errors() -> Iterator[None]:
    """A user's mistake is one red line and exit code 2, not a traceback."""
    try:
        yield
    except (InputError, OSError) as error:  # such as a full disk
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
