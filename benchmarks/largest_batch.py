"""The largest batch with which a step of AMOS fits into a GPU's memory, for each way to compute its heads.

python benchmarks/largest_batch.py --json largest.json
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from repdeg_fast.bench.measure import Step
from repdeg_fast.bench.suite import FORWARD_BACKWARD, Case, Provider, suites


def largest(fits: Callable[[int], bool], start: int = 8) -> int:
    """The largest batch that fits, to within a sixteenth: doubled until one does not, then halved in between."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(case: Case, provider: Provider, batch: int, device: torch.device) -> bool:
    """Whether two steps of that batch run, the second one with the gradients of the first about to go."""
    sized = dataclasses.replace(case, sizes={**case.sizes, "B": batch})
    try:
        _two_steps(sized, provider, device)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _two_steps(case: Case, provider: Provider, device: torch.device) -> None:
    inputs = suites()["training_step"].make_inputs(case, device)
    step = Step(provider, provider.prepare(inputs), inputs, FORWARD_BACKWARD)
    for _ in range(2):
        step.run()
        step.reset()


def main() -> int:
    suite = suites()["training_step"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[case.name for case in suite.cases], default="amos-base")
    names = [provider.name for provider in suite.providers]
    help_ = "which to try (default: eager and ours on Triton; compile compiles anew for each batch, which takes long)"
    parser.add_argument("--provider", choices=names, nargs="+", default=["eager", "ours-triton"], help=help_)
    parser.add_argument("--json", type=Path, help="file for the result, written after each provider")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("largest_batch: no NVIDIA GPU is visible to torch", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    (case,) = (case for case in suite.cases if case.name == options.case)
    found = {}
    for provider in suite.providers:
        if provider.name not in options.provider:
            continue

        def tried(batch: int, provider: Provider = provider) -> bool:
            fitted = fits(case, provider, batch, device)
            print(f"{provider.name}: batch {batch} {'fits' if fitted else 'does not fit'}", flush=True)
            return fitted

        found[provider.name] = largest(tried)
        if options.json:
            options.json.write_text(json.dumps({"case": case.name, "largest_batch": found}, indent=1) + "\n")
    print(f"{case}: " + ", ".join(f"{name} {batch}" for name, batch in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
