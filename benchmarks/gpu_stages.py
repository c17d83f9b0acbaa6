"""What each stage of ``make gpu`` runs, command by command."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PYTHON = (sys.executable, "-m")
# in this order; operations that are not named come after these, and steps of whole models after them
HEADLINE = ("linear_cross_entropy", "gumbel_mix", "mlm_losses_and_sample", "admin_norm", "cosreg")
MODELS = ("training_step", "admin_encoder", "huggingface_step")
PROFILED = ("cosreg", "linear_cross_entropy", "gumbel_mix")  # whose memory is shown
TUNED = "linear_cross_entropy,gumbel_mix,admin_norm,cosreg"  # the longest first; the other suites launch the same
SANITIZED = "value_and_gradient or published_formula or equals_the_two_functions or long_rows"  # every kernel, small
PROCESSES = max(2, os.cpu_count() or 2)  # that compile at a time


@dataclass(frozen=True)
class Visit:
    """A visit to a machine: the name of its GPU in files, where things lie, and what was asked for."""

    name: str
    results: Path = BENCHMARKS / "results"
    work: Path = ROOT / "bench_out"  # ignored by git: the installed package, caches, figures process by process
    out: Path | None = None  # where the archive goes
    wheels: Path | None = None  # of other packages
    dry: bool = False  # on a CPU, with tiny inputs: to see that everything runs

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def site(self) -> Path:
        """The package is installed here, so that a read-only environment will do."""
        return self.work / "site"

    @property
    def parts(self) -> Path:
        return self.work / "parts"

    @property
    def weights(self) -> Path:
        """The tiny checkpoint of a dry run."""
        return self.work / "tiny.pt"

    def environment(self) -> dict[str, str]:
        """What was installed is found first; all processes share what they compile."""
        caches = self.work / "cache"
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(self.site), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])
            ),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            # nothing that a dry run finds is of use to anyone
            **({"REPDEG_FAST_CACHE_DIR": str(caches)} if self.dry else {}),
        }


@dataclass(frozen=True)
class Command:
    """``share``: of what is left of the stage's time, the most that it may take."""

    words: list[str]
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """``share``: of the time left when it starts, beside the shares of those to come. ``together``: its commands run
    several at a time, and their output is kept from the screen."""

    commands: Callable[[Visit], list[Command]]
    share: float
    together: bool = False


def commands(stage: str, visit: Visit) -> list[Command]:
    return STAGES[stage].commands(visit)


def _install(visit: Visit) -> list[Command]:
    flags = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--upgrade"]
    package = Command([*PYTHON, "pip", "install", *flags, "--target", str(visit.site), str(ROOT)], share=0.8)
    tiny = f"import torch; torch.save({{'weight': torch.randn(160, 64)}}, {str(visit.weights)!r})"
    return [package, *([Command([sys.executable, "-c", tiny])] if visit.dry else [])]


def _peers(visit: Visit) -> list[Command]:
    """A wheel that does not install costs itself alone."""
    flags = ["-q", "--no-deps", "--no-index", "--disable-pip-version-check", "--upgrade", "--target", str(visit.site)]
    wheels = sorted(visit.wheels.glob("*.whl")) if visit.wheels else []
    return [Command([*PYTHON, "pip", "install", *flags, str(wheel)], share=0.5) for wheel in wheels]


def _check(visit: Visit) -> list[Command]:
    """About 840 Triton kernels were compiled for 810 tests, 0.7 s each (counted in the interpreter, timed by compiling
    ahead): ten minutes one after the other, less than one on 16 cores. By now there are some 1,500 tests, of which 500
    are of pairs. Tensors of 2³¹ elements, of which a GPU holds a few, come last and one at a time."""
    build = Command([*PYTHON, "repdeg_fast", "info", "--build"], share=0.6)
    cosreg, large = str(ROOT / "tests" / "test_cosreg.py"), str(ROOT / "tests" / "test_large.py")
    if visit.dry:
        quick = [*_tests("not gpu"), *_workers(), "-k", "zero_rows or value_and_gradient and reference", cosreg]
        return [build, Command(quick, share=0.8), Command([*_tests("not gpu"), "-k", "small and losses", large])]
    every = [*_tests("gpu and not large"), *_workers(), str(ROOT / "tests")]
    return [build, Command(every, share=0.85), Command([*_tests("gpu and large"), str(ROOT / "tests")])]


def _tests(marked: str) -> list[str]:
    """A file that cannot be imported there, for want of a package, costs itself alone."""
    plugins = ["-p", "gpu_session", "-p", "no:cacheprovider"]
    return [*PYTHON, "pytest", *plugins, "-m", marked, "-q", "-rfE", "--continue-on-collection-errors"]


def _workers() -> list[str]:
    return ["-n", "auto", "--dist", "load"] if importlib.util.find_spec("xdist") else []


def _sanitize(visit: Visit) -> list[Command]:
    """Each tensor in an allocation of its own: else a step beyond its end meets the next one."""
    tests = [*_tests("gpu"), "-k", SANITIZED, *(str(ROOT / "tests" / f"test_{op}.py") for op in HEADLINE)]
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [Command([*sanitizer, "memcheck", *tests], share=0.5), Command([*sanitizer, "racecheck", *tests])]


def _compile(visit: Visit) -> list[Command]:
    """Every measurement once, quickly, all at a time: what is timed later finds its kernels in the caches. The figures
    mean nothing and are not kept."""
    quick = []
    for command in [*_headline(visit), *_bench(visit)]:
        words = [word for word in command.words if not word.startswith(("--plot=", "--json="))]
        quick.append(Command(["env", "TORCHINDUCTOR_COMPILE_THREADS=2", *words, "--seconds", "0"]))
    return quick[:3] if visit.dry else quick


def _headline(visit: Visit) -> list[Command]:
    """Ours beside PyTorch's forms, operation by operation; then each other package in a process of its own."""
    there = {op: found for op, found in plan(visit).items() if op in HEADLINE}
    ops = sorted(there, key=HEADLINE.index)
    ours = [(op, there[op]["cases"], there[op]["own"]) for op in ops]
    others = [(op, there[op]["cases"], [peer]) for op in ops for peer in there[op]["peers"]]
    return _measure("headline", [*ours, *others], visit)


def _bench(visit: Visit) -> list[Command]:
    """The other operations, whole models, sweeps, and the host's time."""
    there = plan(visit)
    rest = sorted((op for op in there if op not in HEADLINE), key=lambda op: op in MODELS)
    measured = [
        (op, there[op]["cases"], providers)
        for op in rest
        for providers in (there[op]["own"], *([peer] for peer in there[op]["peers"]))
    ]
    sweeps = [(op, found["sweeps"], [*found["own"], *found["peers"]]) for op, found in there.items() if found["sweeps"]]
    overhead = Command([*PYTHON, "repdeg_fast", "bench", "--overhead", "--device", visit.device])
    return [*_measure("bench", [*measured, *([] if visit.dry else sweeps)], visit), overhead]


def _measure(stage: str, wanted: list[tuple[str, list[str], list[str]]], visit: Visit) -> list[Command]:
    """A process for each operation, cases and providers, with its figures in a file of its own: see `parts_of`."""
    commands = []
    for i, (op, cases, providers) in enumerate(wanted):
        words = [*PYTHON, "repdeg_fast", "bench", "--device", visit.device, "--ops", op]
        words.append(f"--json={visit.parts / f'{MEASURING.index(stage)}-{stage}-{i:02}.json'}")
        if visit.dry:
            words += ["--weights", str(visit.weights)]
            providers = [provider for provider in providers if not provider.startswith("compile")]
        else:
            words += ["--cases", ",".join(cases)]
        if _can_plot() and len(providers) > 1:
            words.append(f"--plot={visit.results / visit.name}")
        commands.append(Command([*words, "--providers", ",".join(providers)], share=0.5))
    return commands


def parts_of(stage: str, visit: Visit) -> list[Path]:
    """The files that processes of a stage wrote. In the order of all such names, the headline is first."""
    return sorted(visit.parts.glob(f"*-{stage}-*.json"))


def _tune(visit: Visit) -> list[Command]:
    trials = f"--json={visit.results / visit.name}.tuning.json"
    if visit.dry:
        words = ["env", "TRITON_INTERPRET=1", *PYTHON, "repdeg_fast", "tune", "--ops", "cosreg"]
        return [Command([*words, "--cases", "sweep-4096", "--seconds", "0", trials])]
    return [Command([*PYTHON, "repdeg_fast", "tune", "--ops", TUNED, "--seconds", "0.5", trials])]


def _profile(visit: Visit) -> list[Command]:
    words = [*PYTHON, "repdeg_fast", "profile", "--device", visit.device, "--out", str(visit.results / visit.name)]
    if visit.dry:
        words += ["--weights", str(visit.weights), "--provider", "eager"]
    return [Command([*words, "--op", op], share=0.5) for op in PROFILED if _can_plot()]


def _batch(visit: Visit) -> list[Command]:
    found = str(visit.results / f"{visit.name}.largest_batch.json")
    return [Command([sys.executable, str(BENCHMARKS / "largest_batch.py"), "--json", found])]


STAGES = {
    "install": Stage(_install, 0.05),
    "peers": Stage(_peers, 0.05),
    "check": Stage(_check, 0.30),
    "compile": Stage(_compile, 0.14, together=True),
    "headline": Stage(_headline, 0.25),
    "bench": Stage(_bench, 0.16),
    "tune": Stage(_tune, 0.10),
    "profile": Stage(_profile, 0.05),
    "sanitize": Stage(_sanitize, 0.5),
    "batch": Stage(_batch, 0.5),
}
FIRST = ("install", "peers")  # of every run
MEASURING = ("headline", "bench")  # write figures
BY_NAME = ("sanitize", "batch")  # only when asked for: both take minutes
ALL = tuple(name for name in STAGES if name not in (*FIRST, *BY_NAME))


@functools.cache
def plan(visit: Visit) -> dict[str, Any]:
    """See ``gpu_plan.py``; an error of its process is one here."""
    command = [sys.executable, str(BENCHMARKS / "gpu_plan.py"), visit.device]
    options: dict[str, Any] = {"cwd": visit.site, "env": visit.environment(), "timeout": 120}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options).stdout)


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
