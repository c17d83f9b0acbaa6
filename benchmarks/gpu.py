"""What ``make gpu`` runs on a machine with an NVIDIA GPU: install offline, check, measure, tune, and write the results.

Uses the torch and triton that are there and reaches no network. Each stage has a share of the time and is stopped when
it is used up; figures are written after every case and the report after every stage, so that whatever ends the run,
one is left: ``benchmarks/results/<gpu>.json`` (figures and versions), ``.tuning.json``, ``.md`` (tables) and ``.log``,
plots beside them. What ``tune`` finds is used by later runs, ``bench`` among them, and named in their figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SITE = ROOT / "bench_out" / "site"  # the package is installed here, so that a read-only environment will do
PROFILED = ("cosreg", "linear_cross_entropy", "gumbel_mix")  # whose memory is shown
OPS = (*PROFILED, "mlm_losses_and_sample", "admin_norm")
TUNED = "linear_cross_entropy,gumbel_mix,admin_norm,cosreg"  # the longest first; the other suites launch the same
MINUTES = 8.0
BY_NAME = ("sanitize", "batch")  # stages that run only when asked for: both take minutes
SANITIZED = "value_and_gradient or published_formula or equals_the_two_functions or long_rows"  # every kernel, small
RESERVE = 15.0  # seconds kept back for the report
SHARES = {"check": 0.33, "bench": 0.45, "tune": 0.14, "profile": 0.08}  # of the time left when a stage of `all` starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", *SHARES, *BY_NAME], default="all")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make gpu: ended from outside"))  # passes through `finally`
    return run(options.stage, time.monotonic() + 60 * options.minutes - RESERVE)


def run(wanted: str, deadline: float) -> int:
    """Install and run the stages until the ``deadline``; the report is written again after each."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = gpu_name()
    if name is None:
        print("make gpu: no NVIDIA GPU is visible to torch; check nvidia-smi and CUDA_VISIBLE_DEVICES", file=sys.stderr)
        return 2
    stages = ["install", *(SHARES if wanted == "all" else [wanted])]
    outcomes = dict.fromkeys(stages, "not reached")
    try:
        for i, stage in enumerate(stages):
            write_report(name, outcomes)
            remaining = deadline - time.monotonic()
            share = SHARES.get(stage, 1) / sum(SHARES.get(later, 1) for later in stages[i:])
            outcomes[stage] = "interrupted"
            outcomes[stage] = (
                install(name, remaining / 4) if stage == "install" else run_stage(stage, name, remaining * share)
            )
    finally:
        write_report(name, outcomes)
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


def install(name: str, seconds: float) -> str:
    """By pip; where that fails (an old setuptools, say), by laying the folders out as pyproject.toml names them."""
    outcome = run_stage("install", name, seconds)
    if outcome.startswith("passed"):
        return outcome
    package = SITE / "repdeg_fast"
    for folder, place in (
        ("repdeg_fast", package),
        ("triton_kernels", package / "triton_kernels"),
        ("csrc", package / "csrc"),
    ):
        shutil.copytree(ROOT / folder, place, dirs_exist_ok=True)
    return f"passed by copying the sources, since pip {outcome}"


def gpu_name() -> str | None:
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"make gpu: cannot ask torch for the GPU: {error}", file=sys.stderr)
        return None
    return found.stdout.strip().replace(" ", "_").replace("/", "_") or None


def commands(stage: str, name: str) -> list[list[str]]:
    """What a stage runs, one after the other. Figures do not wait for the plots, nor need them."""
    python, plots = [sys.executable, "-m"], str(RESULTS / name)
    cli = [*python, "repdeg_fast", stage, "--device", "cuda"]
    tests = [*python, "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    if stage == "install":
        flags = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--upgrade"]
        return [[*python, "pip", "install", *flags, "--target", str(SITE), str(ROOT)]]
    if stage == "check":
        return [[*python, "repdeg_fast", "info", "--build"], [*tests, str(ROOT / "tests")]]
    if stage == "sanitize":  # each tensor in an allocation of its own: else a step beyond its end meets the next one
        tests += ["-k", SANITIZED, *(str(ROOT / "tests" / f"test_{op}.py") for op in OPS)]
        sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1", "--tool"]
        return [[*sanitizer, tool, *tests] for tool in ("memcheck", "racecheck")]
    if stage == "bench":
        figures = str(RESULTS / f"{name}.json")
        return [[*cli, "--json", figures, *(["--plot", plots] if _can_plot() else [])]]
    if stage == "batch":
        found = str(RESULTS / f"{name}.largest_batch.json")
        return [[sys.executable, str(ROOT / "benchmarks" / "largest_batch.py"), "--json", found]]
    if stage == "tune":
        trials = str(RESULTS / f"{name}.tuning.json")
        return [[*python, "repdeg_fast", "tune", "--ops", TUNED, "--json", trials, "--seconds", "0.5"]]
    return [[*cli, "--op", op, "--out", plots] for op in PROFILED if _can_plot()]


def run_stage(stage: str, name: str, seconds: float) -> str:
    """Run one stage for at most ``seconds``, its output on the screen and in the log; says how it ended."""
    print(f"== {stage}: at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    ended = "passed"
    if stage == "bench":  # what an earlier run found must not pass for the figures of this one
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
    with open(RESULTS / f"{name}.{stage}.log", "w") as log:
        for command in commands(stage, name):
            remaining = seconds - (time.monotonic() - start)
            outcome = run_limited(command, log, max(1.0, remaining))
            ended = ended if outcome == "passed" else outcome
    outcome = f"{ended} after {time.monotonic() - start:.0f} s"
    print(f"== {stage}: {outcome}", flush=True)
    return outcome


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def run_limited(command: list[str], log: TextIO, seconds: float) -> str:
    """Run a command, copying its output as it comes, and kill it and all it started after ``seconds``."""
    # in a folder without a package: Python looks in the current one first, and would find the sources, not what was
    # installed from them
    SITE.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=SITE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))},
    )
    copying = threading.Thread(target=_copy_lines, args=(process.stdout, log), daemon=True)
    copying.start()
    try:
        code = process.wait(timeout=seconds)
        outcome = "passed" if code == 0 else f"failed (exit {code})"
    except subprocess.TimeoutExpired:
        outcome = "stopped at its time limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        copying.join(timeout=2)  # one that left the group may hold the output open: nobody waits for it
    return outcome


def _copy_lines(source: TextIO, log: TextIO) -> None:
    with suppress(ValueError):  # the log was closed
        for line in source:
            print(line, end="", flush=True)
            print(line, end="", file=log, flush=True)


def write_report(name: str, outcomes: dict[str, str]) -> None:
    """Tables from the figures that were written, whole or not."""
    figures = RESULTS / f"{name}.json"
    rows = read_figures(figures)
    lines = [f"# {name.replace('_', ' ')}", "", "Made by `make gpu`.", ""]
    lines += [f"- {stage}: {outcome}" for stage, outcome in outcomes.items()]
    if rows:
        lines += ["- " + ", ".join(f"{key} {value}" for key, value in rows[0]["versions"].items() if value)]
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        lines += ["", f"## {op}: {case}", "", *_table(row for row in rows if (row["op"], row["case"]) == (op, case))]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(f"report: {RESULTS / f'{name}.md'}")


def read_figures(path: Path) -> list[dict]:
    """None where there are none, or where whatever ended the run cut them short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def _table(rows: Iterable[dict]) -> list[str]:
    lines = [
        "| provider | pass | dtype | ms (p20–p80) | % of roof | peak MB | saved MB | vs eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["ms_median"] is None:
            lines.append(f"| {row['provider']} | {row['pass']} | {row['dtype']} | {row['reason']} | | | | |")
            continue
        time_ = f"{row['ms_median']:.4g} ({row['ms_p20']:.4g}–{row['ms_p80']:.4g})"
        memory = " | ".join(
            "" if row[key] is None else f"{row[key] / 1e6:.3g}" for key in ("peak_bytes", "saved_bytes")
        )
        roof, speedup = (row["percent_of_roof"], row["speedup_vs_eager"])
        numbers = f"{roof:.0f} | {memory} | " + ("" if speedup is None else f"{speedup:.2f}×")
        lines.append(f"| {row['provider']} | {row['pass']} | {row['dtype']} | {time_} | {numbers} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
