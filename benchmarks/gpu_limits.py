"""Run a command for a limited time, keep what it printed, and leave nothing of it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

PASSED, STOPPED = "passed", "stopped at its time limit"
GRACE = 20.0  # seconds from the interrupt, after which pytest prints its failures, to the end
_LOOK = 0.05  # seconds between two looks at several processes


def run_limited(
    command: Sequence[str], log: TextIO, seconds: float, folder: Path, environment: Mapping[str, str]
) -> str:
    """Run a command in ``folder`` for at most ``seconds``, and say how it ended. Its output is copied as it comes, to
    the screen and into the log; it and all that it started are interrupted a little before the end, then killed."""
    grace = min(GRACE, seconds / 4)
    process = _start(command, subprocess.PIPE, folder, environment)
    copying = threading.Thread(target=_copy_lines, args=(process.stdout, log), daemon=True)
    copying.start()
    try:
        outcome = _outcome(process.wait(timeout=seconds - grace))
    except subprocess.TimeoutExpired:
        outcome = STOPPED
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=grace)
    finally:
        _kill(process)
        copying.join(timeout=2)  # one that left the group may hold the output open: nobody waits for it
    return outcome


def run_together(
    commands: Sequence[Sequence[str]],
    log: TextIO,
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    at_once: int,
) -> str:
    """Run all commands within ``seconds``, some at a time, their output into the log alone; says how the first one
    ended that did not pass."""
    end, waiting, outcomes = time.monotonic() + seconds, list(commands), []
    running: list[subprocess.Popen[str]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0), log, folder, environment))
            if time.monotonic() > end:
                return STOPPED
            time.sleep(_LOOK)
            ended = [process for process in running if process.poll() is not None]
            running = [process for process in running if process not in ended]
            outcomes += [_outcome(process.returncode) for process in ended]
    finally:
        for process in running:
            _kill(process)
    return next((outcome for outcome in outcomes if outcome != PASSED), PASSED)


def _interruptible() -> None:
    """In a child: what a shell starts in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start(
    command: Sequence[str], output: TextIO | int, folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    """In a session of its own, so that all that it starts can be ended with it."""
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_interruptible,
        cwd=folder,
        env=dict(environment),
    )


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(code: int) -> str:
    return PASSED if code == 0 else f"failed (exit {code})"


def _copy_lines(source: TextIO, log: TextIO) -> None:
    with suppress(ValueError):  # the log was closed
        for line in source:
            print(line, end="", flush=True)
            print(line, end="", file=log, flush=True)
