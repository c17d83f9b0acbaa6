"""Does ``csrc/`` compile against the headers of the oldest torch versions that we support, and do the Triton kernels
with the oldest Triton? ``make versions``; no part of ``make test``, which holds this environment's versions, because it
downloads what it compiles against (350 MB, without installing it). Takes a folder to find and keep the wheels in."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from torch.utils import cpp_extension

from repdeg_fast.native import build

TORCH = {"2.10.0": "c++17", "2.11.0": "c++17"}  # and the standard that it asks extensions to be compiled for
TRITON = "3.6.0"
_PLATFORM = "macosx_11_0_arm64"  # of the torch wheels: the smallest, and the headers are the same in all


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheels = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "wheels"
        failed = [version for version in TORCH if not compiles_against_torch(version, wheels, folder)]
        failed += [] if compiles_with_triton(wheels, folder) else [TRITON]
    return 1 if failed else 0


def compiles_against_torch(version: str, wheels: Path, folder: Path) -> bool:
    options = ["--platform", _PLATFORM, "--python-version", "3.12"]
    headers = unpack(wheel(f"torch=={version}", wheels, *options), folder / version, "torch/include/")
    (folder / "build_config.h").write_text('#define REPDEG_FAST_FLAGS ""\n#define REPDEG_FAST_CUDA_ARCHITECTURES ""\n')
    sources = [*build.sources("cpu"), *sorted(build.source_root().glob("cuda/*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        includes = [headers / "torch" / "include", sysconfig.get_path("include"), folder]
        errors = dict(
            zip(sources, pool.map(lambda s: compile_errors(s, includes, TORCH[version]), sources), strict=True)
        )
    for source, error in errors.items():
        print(f"torch {version}: {source.name}: {'does not compile' if error else 'compiles'}\n{error}".rstrip())
    return not any(errors.values())


def compiles_with_triton(wheels: Path, folder: Path) -> bool:
    """And no kernel spills more than the assembler chooses to, or asks for more shared memory than there is."""
    package = unpack(wheel(f"triton=={TRITON}", wheels), folder / "triton")
    print(f"triton {TRITON}:", flush=True)
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_triton", "tests/test_ahead_of_time.py"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, *tests], cwd=Path(__file__).parent.parent, env=environment).returncode == 0


def compile_errors(source: Path, includes: Sequence[Path | str], standard: str) -> str:
    """What the compiler says of a file of ``csrc/``, host and device code; empty if it compiles. Without optimizing,
    which takes as long again."""
    includes = [pybind11.get_include(), *includes]  # before the one that torch has among its own
    common = [f"-std={standard}", *(f"-I{path}" for path in includes), "-DTORCH_EXTENSION_NAME=checked", str(source)]
    if source.suffix == ".cpp":
        command = [cpp_extension.get_cxx_compiler(), *build.compile_flags(), "-w", "-fsyntax-only", *common]
    else:
        flags = [*cpp_extension.COMMON_NVCC_FLAGS, *build.cuda_flags(), "-w", "-arch=compute_90", "-code=compute_90"]
        quick = ["-Xcicc", "-O0", "-Xcompiler", "-fsyntax-only"]
        command = ["nvcc", *flags, *quick, "-c", "-o", os.devnull, *common]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def wheel(requirement: str, wheels: Path, *options: str) -> Path:
    """The wheel in ``wheels``, downloaded first if it is not there."""
    pattern = f"{requirement.replace('==', '-')}-*.whl"
    if not list(wheels.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, *options, "-d", wheels, requirement], check=True)
    return next(wheels.glob(pattern))


def unpack(archive: Path, folder: Path, prefix: str = "") -> Path:
    """With their permissions, which ``extractall`` leaves out: Triton runs programs that its wheel brings."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            if member.filename.startswith(prefix) and not member.is_dir():
                path = Path(file.extract(member, folder))
                path.chmod(path.stat().st_mode | member.external_attr >> 16 & 0o111)
    return folder


if __name__ == "__main__":
    sys.exit(main())
