"""``repdeg-fast info``."""

from __future__ import annotations

import os
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from repdeg_fast import backends
from repdeg_fast.bench import measure
from repdeg_fast.cli.console import stdout
from repdeg_fast.native import build
from repdeg_fast.native.cache import cache_root


def info(
    compile_now: Annotated[
        bool, typer.Option("--build", metavar="", help="Compile the C++ and CUDA kernels now, ahead of time.")
    ] = False,
) -> None:
    """Show versions, devices, how the kernels were built, and which backend serves each operation and why."""
    console = stdout()
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


def _table(title: str, *columns: str, **options: bool) -> Table:
    """Long words are folded: a narrow terminal loses nothing."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left", **options)  # type: ignore[arg-type]


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
    table = _table("Environment", "", "", show_header=False)
    for key, value in facts.items():
        table.add_row(key, escape(str("–" if value is None else value)))
    return table


def _libraries_table() -> Table:
    table = _table("Native kernels", "library", "state", "build")
    for library in build.LIBRARIES:
        state = build.state(library)
        built = build.build_info(library) if state in ("loaded", "compiled") else {}
        table.add_row(
            library, escape(state), escape("\n".join(f"{key}: {value}" for key, value in built.items() if value))
        )
    table.caption = escape(f"sources: {build.source_root()}; cache: {cache_root()}")
    return table


def _backends_table() -> Table:
    table = _table("Backends", "operation", "device", "served by", "others")
    for op, devices in backends.status().items():
        for device, entry in devices.items():
            others = [f"{name}: {entry[name] or 'can serve'}" for name in backends.BACKENDS if name != entry["serves"]]
            reason = entry[str(entry["serves"])]  # one that was named may be unable to
            serves = f"[bold]{entry['serves']}[/]" + (f" (cannot serve: {escape(reason)})" if reason else "")
            table.add_row(op, device, serves, escape("\n".join(others)))
    strict = "on: a fallback is an error" if backends.strict() else "off: a fallback is a warning, said once"
    table.caption = (
        "REPDEG_FAST_BACKEND or repdeg_fast.use_backend(name) name one instead. "
        f"Strict (REPDEG_FAST_STRICT=1): {strict}"
    )
    return table
