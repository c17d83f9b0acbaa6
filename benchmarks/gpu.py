"""What ``make gpu`` runs on a machine with an NVIDIA GPU: install offline, check, measure, and write the results.

Uses the torch and triton that are there and reaches no network. Each stage has a share of the time and is stopped when
it is used up; figures are written after every case, so that whatever ends the run, a report is left:
``benchmarks/results/<gpu>.json`` (figures and versions), ``.md`` (tables) and ``.log``, plots beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SITE = ROOT / "bench_out" / "site"  # the package is installed here, so that a read-only environment will do
OPS = ("cosreg", "linear_cross_entropy", "gumbel_mix")  # whose memory is profiled
MINUTES = 8.0
SHARES = {"check": 0.4, "bench": 0.45, "profile": 0.1}  # of the time that is left when a stage of `all` starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", *SHARES], default="all")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default: %(default)s)")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    RESULTS.mkdir(exist_ok=True)
    install()
    name = gpu_name()
    if name is None:
        print("make gpu: no NVIDIA GPU is visible to torch; check nvidia-smi and CUDA_VISIBLE_DEVICES", file=sys.stderr)
        return 2
    stages = list(SHARES) if options.stage == "all" else [options.stage]
    outcomes = {}
    try:
        for i, stage in enumerate(stages):
            remaining = deadline - time.monotonic() - 15  # kept back for the report
            share = SHARES[stage] / sum(SHARES[later] for later in stages[i:])
            outcomes[stage] = run_stage(stage, name, max(10.0, remaining * share))
    finally:
        write_report(name, outcomes)
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


def install() -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(SITE), str(ROOT)], check=True, timeout=240)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))


def gpu_name() -> str | None:
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return found.replace(" ", "_").replace("/", "_") or None


def commands(stage: str, name: str) -> list[list[str]]:
    """The modules that a stage runs one after the other. Figures do not wait for the plots, nor need them."""
    cli, figures, plots = ["repdeg_fast", stage, "--device", "cuda"], RESULTS / f"{name}.json", str(RESULTS / name)
    if stage == "check":
        return [["pytest", str(ROOT / "tests"), "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]]
    if stage == "bench":
        return [[*cli, "--json", str(figures), *(["--plot", plots] if _can_plot() else [])]]
    return [[*cli, "--op", op, "--out", plots] for op in OPS if _can_plot()]


def run_stage(stage: str, name: str, seconds: float) -> str:
    """Run one stage for at most ``seconds``, its output on the screen and in the log; says how it ended."""
    print(f"== {stage}: at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    ended = "passed"
    with open(RESULTS / f"{name}.{stage}.log", "w") as log:
        for command in commands(stage, name):
            remaining = seconds - (time.monotonic() - start)
            outcome = run_limited([sys.executable, "-m", *command], log, max(1.0, remaining))
            ended = ended if outcome == "passed" else outcome
    outcome = f"{ended} after {time.monotonic() - start:.0f} s"
    print(f"== {stage}: {outcome}", flush=True)
    return outcome


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def run_limited(command: list[str], log: TextIO, seconds: float) -> str:
    """Run a command, copying its output as it comes, and kill it and all it started after ``seconds``."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        print(line, end="", file=log, flush=True)
    code = process.wait()
    timer.cancel()
    return "stopped at its time limit" if stopped.is_set() else "passed" if code == 0 else f"failed (exit {code})"


def write_report(name: str, outcomes: dict[str, str]) -> None:
    """Tables from the figures that were written, whole or not."""
    figures = RESULTS / f"{name}.json"
    rows = json.loads(figures.read_text()) if figures.exists() else []
    lines = [f"# {name.replace('_', ' ')}", "", "Made by `make gpu`.", ""]
    lines += [f"- {stage}: {outcome}" for stage, outcome in outcomes.items()]
    if rows:
        lines += ["- " + ", ".join(f"{key} {value}" for key, value in rows[0]["versions"].items() if value)]
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        lines += ["", f"## {op}: {case}", "", *_table(row for row in rows if (row["op"], row["case"]) == (op, case))]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(f"report: {RESULTS / f'{name}.md'}")


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
