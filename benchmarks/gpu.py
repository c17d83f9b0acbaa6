"""What ``make gpu`` runs on a machine with an NVIDIA GPU: install offline, check, measure, tune, and hand back.

Uses the torch and triton that are there and reaches no network. Each stage has a share of the time and is stopped when
it is used up; figures are written after every case, and after every process they are put together, reported, and
packed, so that whatever ends the run, they are there: ``benchmarks/results/<gpu>.json`` (figures and versions),
``.tuning.json``, ``.md`` (tables) and logs, plots beside them, and all of it as one archive in the folder ``--out``.
What ``tune`` finds is used by later runs, ``bench`` among them, and named in their figures.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import gpu_packing
import gpu_report
import gpu_stages
from gpu_limits import PASSED, run_limited, run_together
from gpu_stages import ALL, FIRST, MEASURING, ROOT, STAGES, Command, Visit

MINUTES = 8.0
RESERVE = 15.0  # seconds kept back for the report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = [name for name in STAGES if name not in FIRST]
    parser.add_argument("--stage", default="all", help=f"all, or of these, with commas between: {', '.join(named)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for one archive of all results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of other packages to measure beside ours")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny: to see that every stage runs")
    options = parser.parse_args()
    stages = list(ALL) if options.stage == "all" else options.stage.split(",")
    if unknown := sorted({*stages} - {*named}):
        parser.error(f"--stage: got {', '.join(unknown)}; there are all, {', '.join(named)}")
    name = "dry-run" if options.dry_run else gpu_name()
    if name is None:
        print("make gpu: no NVIDIA GPU is visible to torch; check nvidia-smi and CUDA_VISIBLE_DEVICES", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make gpu: ended from outside"))  # passes through `finally`
    aside = ROOT / "bench_out" / "dry"  # what a dry run finds must not pass for results
    places = {"results": aside / "results", "work": aside} if options.dry_run else {}
    visit = Visit(name, out=options.out, wheels=options.wheels, dry=options.dry_run, **places)
    return run(stages, visit, time.monotonic() + 60 * options.minutes - RESERVE)


def gpu_name() -> str | None:
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"make gpu: cannot ask torch for the GPU: {error}", file=sys.stderr)
        return None
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", found.stdout.strip()) or None


def run(wanted: list[str], visit: Visit, deadline: float) -> int:
    """Install and run the stages until the ``deadline``. One that fails costs itself alone."""
    for folder in (visit.results, visit.site, visit.parts):
        folder.mkdir(parents=True, exist_ok=True)
    stages = [*(FIRST if visit.wheels else FIRST[:1]), *wanted]
    outcomes = dict.fromkeys(stages, "not reached")
    _forget(visit, stages)
    try:
        for i, stage in enumerate(stages):
            hand_over(visit, outcomes)
            share = STAGES[stage].share / sum(STAGES[later].share for later in stages[i:])
            outcomes[stage] = "interrupted"
            outcomes[stage] = run_stage(stage, visit, share * (deadline - time.monotonic()), outcomes)
    finally:
        hand_over(visit, outcomes)
    return 0 if all(outcome.startswith(PASSED) for outcome in outcomes.values()) else 1


def _forget(visit: Visit, stages: list[str]) -> None:
    """What an earlier run found must not pass for the figures of this one; those of a stage that is not run stay."""
    for stage in {*stages} & {*MEASURING}:
        (visit.results / f"{visit.name}.json").unlink(missing_ok=True)
        for old in gpu_stages.parts_of(stage, visit):
            old.unlink()


def run_stage(stage: str, visit: Visit, seconds: float, outcomes: dict[str, str]) -> str:
    """Run one stage for at most ``seconds``, its output on the screen and in its log; says how it ended."""
    print(f"== {stage}: at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    with open(visit.results / f"{visit.name}.{stage}.log", "w") as log:
        try:
            commands = gpu_stages.commands(stage, visit)
            together = STAGES[stage].together
            ended = (_together if together else _in_turn)(commands, log, visit, start + seconds, outcomes)
        except (OSError, subprocess.SubprocessError, ValueError) as error:  # a program or folder that is not there
            print(f"{stage}: {error}", file=log)
            ended = f"failed ({error})"
    if stage == "install" and not ended.startswith(PASSED):
        ended = _lay_out(visit, ended)
    outcome = f"{ended} after {time.monotonic() - start:.0f} s"
    print(f"== {stage}: {outcome}", flush=True)
    return outcome


def _in_turn(commands: list[Command], log: TextIO, visit: Visit, end: float, outcomes: dict[str, str]) -> str:
    ended = PASSED
    for command in commands:
        seconds = max(0.3, command.share * (end - time.monotonic()))
        outcome = run_limited(command.words, log, seconds, visit.site, visit.environment())
        ended = ended if outcome == PASSED else outcome
        hand_over(visit, outcomes)
    return ended


def _together(commands: list[Command], log: TextIO, visit: Visit, end: float, outcomes: dict[str, str]) -> str:
    words, seconds = [command.words for command in commands], end - time.monotonic()
    return run_together(words, log, seconds, visit.site, visit.environment(), gpu_stages.PROCESSES)


def _lay_out(visit: Visit, ended: str) -> str:
    """Where pip fails (an old setuptools, say): the folders as pyproject.toml names them."""
    package = visit.site / "repdeg_fast"
    for folder, place in (
        ("repdeg_fast", package),
        ("triton_kernels", package / "triton_kernels"),
        ("csrc", package / "csrc"),
    ):
        shutil.copytree(ROOT / folder, place, dirs_exist_ok=True)
    return f"{PASSED} by copying the sources, since pip {ended}"


def hand_over(visit: Visit, outcomes: dict[str, str]) -> None:
    """The figures so far in one file, the report, and the archive."""
    rows = gpu_report.merge(visit.parts, visit.results / f"{visit.name}.json")
    gpu_report.write(visit.results / f"{visit.name}.md", visit.name, outcomes, rows)
    if visit.out:
        gpu_packing.pack(visit.results, visit.name, visit.out)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
