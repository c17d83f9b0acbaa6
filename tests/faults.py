"""Faults that the tests must see: ``python tests/faults.py [-k WORD]`` puts each into a copy of the tree, by hand as it
were, and runs the few tests that should fail. A fault that none sees is a missing test. Not collected: it compiles the
C++ kernels once for each of their faults."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fault_lists import FAULTS, Fault

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", metavar="WORD", help="only faults with this in their file or description")
    word = parser.parse_args().k
    faults = sorted((f for f in FAULTS if word in f"{f.file} {f.what}"), key=lambda fault: fault.file)
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder) / "tree", ignore=NOT_COPIED)
        (tree / "repdeg_fast" / "triton_kernels").symlink_to(tree / "triton_kernels")  # as installed
        if not all(_passes_without(tree, faults, interpreted) for interpreted in (False, True)):
            return 2
        caught = [_is_caught(tree, fault) for fault in faults]
    print(f"caught {sum(caught)} of {len(faults)}")
    return 0 if all(caught) else 1


def _passes_without(tree: Path, faults: list[Fault], interpreted: bool) -> bool:
    selections = sorted({fault.tests for fault in faults if fault.interpreted == interpreted})
    failing = [tests for tests in selections if _pytest(tree, tests, interpreted).returncode != 0]
    for tests in failing:
        print(f"fails without a fault, or there is no such test: {tests}")
    return not failing


def _is_caught(tree: Path, fault: Fault) -> bool:
    path = tree / fault.file
    before = path.read_text() if path.exists() else ""
    if before.count(fault.text) != 1:
        return _report("STALE", fault, f"its text is there {before.count(fault.text)} times, not once: {fault.text}")
    path.write_text(before.replace(fault.text, fault.replacement))
    done = _pytest(tree, fault.tests, fault.interpreted)
    path.write_text(before)
    printed, died = done.stdout + done.stderr, done.returncode < 0
    if "ninja: build stopped" in printed:
        return _report("STALE", fault, f"does not compile\n{printed[-3000:]}")
    last = (done.stdout.splitlines() or [""])[-1]
    if died or (done.returncode == 1 and " failed" in last):
        return _report("caught", fault)
    return _report("ESCAPED", fault, last)


def _report(verdict: str, fault: Fault, why: str = "") -> bool:
    print(f"{verdict:8} {fault.file}: {fault.what}{why and f': {why}'}", flush=True)
    return verdict == "caught"


def _pytest(tree: Path, tests: str, interpreted: bool) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one second would share their bytecode
        "REPDEG_FAST_CACHE_DIR": str(tree / "cache"),
        "TRITON_INTERPRET": str(int(interpreted)),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "faults",
        *shlex.split(tests),
    ]
    command += ["-m", "interpreter"] * interpreted
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def pytest_configure() -> None:
    """As a plugin of the runs above: what was compiled of files without the fault is used again. The library is kept
    for processes that a test starts, which would compile all of it while others wait."""
    from repdeg_fast.native import build, cache

    def compile_what_changed(library: str, path: Path) -> object:
        folder = path.parent.parent / "objects"
        folder.mkdir(exist_ok=True)
        module = build._run_compiler(library, path.stem, folder)
        cache.keep(Path(shutil.copy(folder / path.name, path.with_suffix(".new"))), path)
        return module

    build._compile = compile_what_changed


if __name__ == "__main__":
    sys.exit(main())
