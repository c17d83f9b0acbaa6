"""Compile kernels without a GPU and read what the compiled code needs: registers, spills, shared memory."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repdeg_fast import native

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_MEMORY_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. ``spilled`` is in bytes a thread (on AMD: spilled registers)."""

    registers: int
    spilled: int
    shared_bytes: int
    matrix_instruction: str
    assembly: str


def specializations() -> Iterator[Any]:
    """Every specialization that a module of ``triton_kernels`` lists."""
    package = importlib.import_module("repdeg_fast.triton_kernels")
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"repdeg_fast.triton_kernels.{module_info.name}")
        yield from getattr(module, "specializations", tuple)()


def compile_triton(specialization: Any, target: str) -> Resources:
    """Compile one :class:`~repdeg_fast.triton_kernels.tuning.Specialization` for ``target`` (one of ``TARGETS``)."""
    import triton
    from triton.compiler import ASTSource

    kernel, constants = specialization.kernel, specialization.constants
    signature = {name: specialization.types.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if signature[name] == "constexpr" and name not in constants]
    if missing:
        raise ValueError(f"{kernel.__name__}: neither a type nor a constant for {', '.join(missing)}")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in specialization.divisible
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": specialization.num_warps, "num_stages": specialization.num_stages}
    compiled = triton.compile(source, target=_gpu_target(target), options=options)
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        return _amd_resources(compiled.asm["amdgcn"], shared)
    return _nvidia_resources(compiled.asm["cubin"], compiled.asm["ptx"], shared)


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _amd_resources(assembly: str, shared: int) -> Resources:
    def count(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    matrix = "mfma" if "v_mfma" in assembly else ""
    return Resources(count("vgpr_count"), count("vgpr_spill_count"), shared, matrix, assembly)


def compile_cuda(source: Path, target: str, folder: Path) -> dict[str, Resources]:
    """Compile one ``.cu`` file with nvcc for ``target``; returns what each of its kernels needs."""
    from torch.utils import cpp_extension

    cubin = folder / f"{source.stem}.{target}.cubin"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    command = ["nvcc", *native.cuda_flags(), "-std=c++20", *includes, f"-arch={target}", "-cubin", "-o", str(cubin)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr}")
    return {name: Resources(*usage, "", "") for name, usage in _resource_usage(cubin).items()}


def _nvidia_resources(cubin: bytes, ptx: str, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ((registers, spilled, _),) = _resource_usage(Path(file.name)).values()
    matrix = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "")
    return Resources(registers, spilled, shared, matrix, ptx)


def _resource_usage(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory of each kernel in a cubin. Spills are the stack and local
    memory: our kernels ask for none of their own."""
    command = [str(_cuobjdump()), "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", report):
        usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        found[name] = (usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"])
    return found


def _cuobjdump() -> Path:
    """The disassembler that Triton's package carries."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
