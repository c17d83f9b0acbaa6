"""Writes ``benchmarks/KERNELS.md``: what each Triton and CUDA kernel, compiled for Hopper, needs of a multiprocessor
and what its code is made of. Needs triton and nvcc, no GPU: ``python benchmarks/kernels.py`` (a few minutes).
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kernel_resources as resources
import torch
from kernel_resources import H200, Resources

from repdeg_fast.native import build

TABLE = Path(__file__).parent / "KERNELS.md"
TARGET = "sm_90"
_DTYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}
_PACK_BYTES, _BARRIER_BYTES = 16, 8
_MOST_STAGES, _BESIDE_RINGS = 3, 2048  # as ring_size() has them

HEADER = f"""# The kernels, compiled for {TARGET}

Made by `make tables` from the code that Triton {{triton}} and nvcc {{nvcc}} compiled; nothing here was measured. For
each kernel and specialization: threads of a block (the largest where the launcher chooses), registers and spilled bytes
of a thread, shared memory of a block, the warps that one multiprocessor of an H200 holds at once of {H200.warps}, with
what limits them, and the memory and tensor-core instructions in its code. "16 B ×4" are four instructions that move 16
bytes a thread each; "async" are copies from global to shared memory past the registers (`LDGSTS`), "bulk" those of the
tensor memory accelerator. Counts are of instructions in the code, not of their executions. A name that ends in sizes is
a configuration that tuning tries beside the one that ships. [NOTES.md](NOTES.md) says what was surprising and what
became of it. `make versions` compiles all Triton kernels with the oldest Triton that is supported, too.
"""
_COLUMNS = ("kernel", "threads", "registers", "spilled", "shared", "resident warps", "loads", "stores", "matrix")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = {"Triton": dict(triton_kernels()), "CUDA": dict(cuda_kernels(Path(folder)))}
    header = HEADER.format(triton=importlib.metadata.version("triton"), nvcc=nvcc_version())
    text = "\n".join([header, *(line for title, kernels in found.items() for line in _table(title, kernels))])
    TABLE.write_text(text.rstrip() + "\n")
    print(f"{TABLE}: {sum(map(len, found.values()))} kernels")
    return 0


def specializations() -> dict[str, Any]:
    """The Triton specializations for this chip by their name in the table."""
    for_target = (s for s in resources.specializations() if TARGET in (s.targets or (TARGET,)))
    return {f"{s.kernel.__module__.split('.')[-1]}{s.kernel.__name__} {s.label}".strip(): s for s in for_target}


def triton_kernels() -> Iterator[tuple[str, Resources]]:
    for name, specialization in specializations().items():
        yield name, resources.compile_triton(specialization, TARGET)


def cuda_kernels(folder: Path) -> Iterator[tuple[str, Resources]]:
    sources = sorted((build.source_root() / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda source: resources.compile_cuda(source, TARGET, folder), sources))
    for source, kernels in zip(sources, compiled, strict=True):
        yield from sorted((f"{source.stem} {cuda_name(name)}", used) for name, used in kernels.items())


def nvcc_version() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", printed)[0]


def cuda_name(mangled: str) -> str:
    """``forward_kernel<Layout<32, 128, 8>, bf16>``"""
    name = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", torch._C._demangle(mangled)).split("(", 1)[0]
    return re.sub(r"\b(\w+)\b", lambda word: _DTYPES.get(word.group(), word.group()), name)


def _table(title: str, kernels: Mapping[str, Resources]) -> list[str]:
    rows = [_row(name, used) for name, used in kernels.items()]
    return [f"## {title}", "", *("| " + " | ".join(cells) + " |" for cells in (_COLUMNS, ["---"] * 9, *rows)), ""]


def _row(name: str, used: Resources) -> list[str]:
    shared = used.shared_bytes + staged_bytes(name, used.threads)
    warps, limit = H200.resident_warps(used.registers, shared, used.threads)
    resident = f"{warps} ({100 * warps // H200.warps} %), {limit}"
    loads = _widths(used.accesses("LDG")) + _widths(used.accesses("LDGSTS"), "async ")
    loads += [f"bulk ×{used.bulk_copies}"] * bool(used.bulk_copies)
    matrix = ", ".join(f"{instruction} ×{count}" for instruction, count in used.matrix.items())
    numbers = [str(number) for number in (used.threads, used.registers, used.spilled, shared)]
    return [name, *numbers, resident, ", ".join(loads), ", ".join(_widths(used.accesses("STG"))), matrix]


def _widths(accesses: dict[int, int], kind: str = "") -> list[str]:
    return [f"{kind}{width} B ×{count}" for width, count in accesses.items()]


def staged_bytes(name: str, threads: int) -> int:
    """Shared memory that a CUDA launcher asks for and the compiled code does not tell: the rings of rows of csrc/cuda/
    row_ring.cuh, for the longest rows that a kernel takes."""
    if found := re.match(r"admin_norm_\w+ (forward|backward)_kernel<\w+, (\d)", name):
        streams, packs = {"forward": 2, "backward": 3}[found.group(1)], int(found.group(2))
        stage = streams * packs * threads * _PACK_BYTES + _BARRIER_BYTES
    elif found := re.match(r"cosreg \w+_kernel<Layout<(\d+), (\d+), (\d+)>, \w+?(\d+)(, true)?", name):
        together, block, values, bits = map(int, found.groups()[:4])
        streams = 2 if found.group(5) else 1
        stage = block // together * (streams * together * values * bits // 8 + _BARRIER_BYTES)
    else:
        return 0
    room = resources.SHARED_MEMORY_LIMIT[TARGET] - _BESIDE_RINGS
    return stage * min(_MOST_STAGES, max(1, room // stage))


if __name__ == "__main__":
    sys.exit(main())
