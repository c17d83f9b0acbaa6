"""Compile kernels without a GPU and read what the compiled code needs, and what is in it: registers, spills, shared
memory, the width of loads and stores, matrix instructions; and how many of its threads a chip can hold at once."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kernel_launches
import torch

from repdeg_fast.native import build, cache

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_MEMORY_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block


_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}  # of an access; none of these: 32
_MATRIX = re.compile(r"(HGMMA|QGMMA|IGMMA|UTC\w*MMA|HMMA|IMMA|DMMA|v_s?mfma)\b|v_mfma")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs, and how often each instruction stands in its code, which is disassembled when
    asked for: that takes as long as compiling did.

    ``spilled`` is in bytes a thread (on AMD: spilled registers). ``threads`` is the size of a block, the largest one
    allowed where the launcher chooses. Shared memory that a CUDA launcher asks for beside it is not known here.
    """

    registers: int
    spilled: int
    shared_bytes: int
    threads: int
    count_instructions: Callable[[], Mapping[str, int]]

    @functools.cached_property
    def instructions(self) -> Mapping[str, int]:
        return self.count_instructions()

    @property
    def matrix(self) -> dict[str, int]:
        """Tensor-core instructions: ``{"HGMMA.64x128x16.F32.BF16": 4}``."""
        return {name: count for name, count in self.instructions.items() if _MATRIX.match(name)}

    def accesses(self, kind: str) -> dict[int, int]:
        """Instructions by the bytes a thread moves with each, the widest first; ``kind``: ``"LDG"`` (global loads),
        ``"STG"`` (stores) or ``"LDGSTS"`` (copies to shared memory, past the registers). NVIDIA only."""
        widths: Counter[int] = Counter()
        for name, count in self.instructions.items():
            opcode, *modifiers = name.split(".")
            if opcode == kind:
                widths[next((_BITS[m] for m in modifiers if m in _BITS), 32) // 8] += count
        return dict(sorted(widths.items(), reverse=True))

    @property
    def bulk_copies(self) -> int:
        """Copies by the tensor memory accelerator."""
        return sum(count for name, count in self.instructions.items() if name.startswith(("UTMA", "UBLKCP")))


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share, and in what portions a chip hands it out."""

    registers: int = 65_536
    shared_bytes: int = 228 << 10
    threads: int = 2048
    blocks: int = 32
    shared_reserved: int = 1024  # of each block, for the system
    shared_portion: int = 128
    warp_registers_portion: int = 256
    warps_portion: int = 4  # one on each of its four parts

    @property
    def warps(self) -> int:
        return self.threads // 32

    def resident_warps(self, registers: int, shared_bytes: int, threads: int) -> tuple[int, str]:
        """Warps that it holds at once of blocks that need so much, and what there is too little of for more:
        "registers", "shared memory", "threads" or "blocks"."""
        warps = -(-threads // 32)
        each = -(-32 * registers // self.warp_registers_portion) * self.warp_registers_portion
        by_registers = self.registers // max(each, 1) // self.warps_portion * self.warps_portion // warps
        shared = -(-(shared_bytes + self.shared_reserved) // self.shared_portion) * self.shared_portion
        most = {
            "threads": self.warps // warps,
            "registers": by_registers,
            "shared memory": self.shared_bytes // shared,
            "blocks": self.blocks,
        }
        limit = min(most, key=lambda name: most[name])
        return warps * most[limit], limit


H200 = Multiprocessor()  # as H100: the figures of compute capability 9.0


def specializations() -> Iterator[Any]:
    """Every specialization that a launcher asks for."""
    yield from kernel_launches.specializations()
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
        return _amd_resources(compiled.asm["amdgcn"], shared, 64 * specialization.num_warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = _read_cubin(Path(file.name)).values()
    return replace(found, shared_bytes=shared)  # its shared memory is given at launch


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _amd_resources(assembly: str, shared: int, threads: int) -> Resources:
    def count(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    instructions = Counter(re.findall(r"^\s+((?:v|s|ds|global|buffer)_\w+)", assembly, re.MULTILINE))
    return Resources(count("vgpr_count"), count("vgpr_spill_count"), shared, threads, lambda: instructions)


def compile_cuda(source: Path, target: str, folder: Path) -> dict[str, Resources]:
    """Compile one ``.cu`` file with nvcc for ``target``, or take what an earlier run made of it; returns what each
    of its kernels needs."""
    from torch.utils import cpp_extension

    cubin = folder / f"{source.stem}.{target}.cubin"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, *build.cuda_flags(), "-std=c++20", f"-arch={target}"]
    command = ["nvcc", *flags, *includes, "-cubin"]
    made = kept(source, " ".join(command))
    if not made.exists():
        done = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr}")
        shutil.copy(cubin, draft := made.with_name(f"{made.name}.{os.getpid()}"))
        os.replace(draft, made)
    return _read_cubin(made)


def kept(source: Path, command: str) -> Path:
    """A place for what nvcc makes of a ``.cu`` file, named after everything that decides it: a few files take nvcc
    longer than all tests of their kernels."""
    digest = hashlib.sha256(b"\0".join([_cuda_facts(), command.encode(), source.read_bytes()])).hexdigest()
    folder = cache.cache_root() / "nvcc"
    cache.make_folder(folder)
    return folder / digest[:16]


@functools.cache
def _cuda_facts() -> bytes:
    """What decides what nvcc makes, beside a file and the command."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    headers = [path for path in sorted(build.source_root().rglob("*")) if path.suffix in (".h", ".cuh")]
    return b"\0".join([version, torch.__version__.encode(), *(path.read_bytes() for path in headers)])


def _read_cubin(cubin: Path) -> dict[str, Resources]:
    """What each kernel of a cubin needs. Spills are the stack and local memory: our kernels ask for none themselves."""
    usage = _cuobjdump("-res-usage", cubin)
    threads = re.split(r"^\.nv\.info\.(\S+)", _cuobjdump("-elf", cubin), flags=re.MULTILINE)
    blocks = {name: _block_threads(text) for name, text in zip(threads[1::2], threads[2::2], strict=True)}
    content = cubin.read_bytes()
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        used = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        spilled = used["STACK"] + used["LOCAL"]
        count = functools.partial(_instructions, content, name)
        found[name] = Resources(used["REG"], spilled, used["SHARED"], blocks[name], count)
    return found


def _instructions(cubin: bytes, kernel: str) -> Mapping[str, int]:
    return _disassembled(cubin)[kernel]


@functools.lru_cache(1)  # for all kernels of a file
def _disassembled(cubin: bytes) -> dict[str, Counter[str]]:
    """How often each instruction stands in each kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = re.split(r"^\s*Function : (\S+)", _cuobjdump("-sass", Path(file.name)), flags=re.MULTILINE)
    return {name: Counter(_INSTRUCTION.findall(text)) for name, text in zip(code[1::2], code[2::2], strict=True)}


def _block_threads(attributes: str) -> int:
    """The size of a block that the compiler was told of: exact or the largest."""
    x, y, z = re.findall(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+Value:\s+(\w+) (\w+) (\w+)", attributes)[0]
    return int(x, 16) * int(y, 16) * int(z, 16)


def _cuobjdump(option: str, cubin: Path) -> str:
    """The disassembler that Triton's package carries, at work."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(program), option, str(cubin)], capture_output=True, text=True, check=True).stdout
