"""Writes ``benchmarks/BUDGET.md``: for each operation and GPU case the bytes that must move, the operations that must
be done, and the time that these take on an H200 at the least. Computed from the suites; nothing is measured.
``python benchmarks/budget.py``
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from repdeg_fast.bench.suite import PASSES, Case, Suite, Work, dtype_name, suites

TABLE = Path(__file__).parent / "BUDGET.md"


@dataclass(frozen=True)
class Chip:
    """Bytes and operations a second, by the vendor's datasheet, and the shares of them that are taken to be real."""

    bytes: float = 4.8e12
    matrix_16: float = 989e12
    matrix_fp32: float = 494e12 / 3  # three tf32 products each
    vector: float = 67e12
    copy_share: float = 0.9
    matrix_share: float = 0.8

    def operations(self, op: str, dtype: torch.dtype) -> float:
        if op in VECTOR_OPS:
            return self.vector
        return self.matrix_16 if dtype.itemsize == 2 else self.matrix_fp32


H200 = Chip()
VECTOR_OPS = ("cosreg", "admin_norm")  # whose operations are not those of products

HEADER = f"""# What each operation must cost on an H200

Made by `make tables` from the cases and their counted work in `repdeg_fast/bench/suites/`. **Computed, not measured.**

- *bytes*, *operations*: what must move and be done, whoever does it (the `work` function of each suite says why).
- *floor*: the longer of the two at the datasheet's {H200.bytes / 1e12:.1f} TB/s and, for products,
  {H200.matrix_16 / 1e12:.0f} TFLOP/s in 16 bits or {H200.matrix_fp32 / 1e12:.0f} in fp32 (as three tf32 products); for
  the rest {H200.vector / 1e12:.0f} TFLOP/s. Launches are not counted.
- *assumed floor*: the same at the shares that we ASSUME a device copy ({100 * H200.copy_share:.0f} %) and a large GEMM
  ({100 * H200.matrix_share:.0f} %) to reach. `make gpu` measures both; its per cent of the roof are of those.

What our kernels are predicted to take, and why, is in [NOTES.md](NOTES.md).
"""
_COLUMNS = ("case", "sizes", "dtype", "pass", "MB", "GFLOP", "bound by", "floor µs", "assumed floor µs")


def main() -> int:
    lines = [HEADER]
    for suite in suites().values():
        if cases := [case for case in suite.cases if "cuda" in case.default_on and case.group is None]:
            lines += [f"## {suite.op}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
            lines += [_line(_row(suite, case, pass_)) for case in cases for pass_ in PASSES]
            lines.append("")
    TABLE.write_text("\n".join(lines).rstrip() + "\n")
    print(TABLE)
    return 0


def floors(op: str, dtype: torch.dtype, work: Work, chip: Chip = H200) -> tuple[float, float, str]:
    """Seconds by the datasheet, seconds at the assumed shares, and which of the two it is."""
    moving, doing = work.bytes / chip.bytes, work.flops / chip.operations(op, dtype)
    share = 1.0 if op in VECTOR_OPS else chip.matrix_share
    return max(moving, doing), max(moving / chip.copy_share, doing / share), "bytes" if moving > doing else "operations"


def _row(suite: Suite, case: Case, pass_: str) -> list[str]:
    work = suite.work(case, pass_, False)
    floor, assumed, bound = floors(suite.op, case.dtype, work)
    sizes = ", ".join(f"{name} {size:,}" for name, size in case.sizes.items())
    counted = [f"{work.bytes / 1e6:,.1f}", f"{work.flops / 1e9:,.1f}", bound]
    return [case.name, sizes, dtype_name(case.dtype), pass_, *counted, f"{1e6 * floor:,.1f}", f"{1e6 * assumed:,.1f}"]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
