"""What there is to measure on a device, as JSON: for each operation its cases, those of sweeps, the providers that run
in one process, and the other packages that are installed, each for a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys

from repdeg_fast.bench import peers
from repdeg_fast.bench.suite import Suite, suites

_MODULES = {peer.package: peer.module for peer in peers.PACKAGES}


def main() -> None:
    device = sys.argv[1]
    print(json.dumps({op: plan(suite, device) for op, suite in suites().items()}))


def plan(suite: Suite, device: str) -> dict[str, list[str]]:
    cases = [case for case in suite.cases if device in case.default_on and not case.unavailable]
    others = [provider.name for provider in suite.providers if provider.peer and is_installed(provider.peer)]
    return {
        "cases": [case.name for case in cases if case.group is None],
        "sweeps": [case.name for case in cases if case.group],
        "own": [provider.name for provider in suite.providers if provider.name not in others],
        "peers": others,
    }


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(_MODULES[package]) is not None


if __name__ == "__main__":
    main()
