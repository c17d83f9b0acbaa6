"""A wheel that brings its C++ kernels compiled: ``python benchmarks/prebuilt_wheel.py OUT`` (Linux, x86-64).

One for every Python and every torch from 2.10 on, since the kernels use nothing but PyTorch's stable ABI; inside, a
library for processors with AVX2 and one for those with AVX-512. Its tag names the oldest glibc that the libraries ask
for, so what is to be uploaded is made in an image of an old system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from repdeg_fast.native import build, prebuilt

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        print(write(Path(sys.argv[1]), Path(temporary)))
    return 0


def write(out: Path, work: Path) -> Path:
    """Returns the wheel's path."""
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")  # setuptools would pack an old build
    tree = shutil.copytree(ROOT, work / "tree", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", work, tree], check=True)
    (plain,) = work.glob("*.whl")
    unpacked = work / "unpacked"
    zipfile.ZipFile(plain).extractall(unpacked)
    libraries = compile_libraries(unpacked / "repdeg_fast" / "prebuilt", work / "objects")
    (metadata,) = unpacked.glob("*.dist-info/WHEEL")
    tag = f"py3-none-{platform_tag(libraries)}"
    text = metadata.read_text(encoding="utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    metadata.write_text(re.sub(r"^Tag: .*$", f"Tag: {tag}", text, flags=re.MULTILINE), encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "wheel", "pack", "-d", out, unpacked], check=True, stdout=subprocess.DEVNULL)
    return out / f"{'-'.join(plain.name.split('-')[:2])}-{tag}.whl"


def compile_libraries(folder: Path, objects: Path) -> list[Path]:
    """One an instruction set, each with a file that says how it was made."""
    return [compile_library(folder / name, objects / name, name) for name in prebuilt.INSTRUCTION_SETS]


def compile_library(folder: Path, objects: Path, instruction_set: str) -> Path:
    folder.mkdir(parents=True)
    objects.mkdir(parents=True)
    compiler = cpp_extension.get_cxx_compiler()
    flags = [re.sub("=native$", f"={instruction_set}", flag) for flag in build.compile_flags()]
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    options = [*flags, "-std=c++17", "-w", "-Wno-psabi", "-fPIC", *headers]
    sources = [path for path in build.sources("cpu") if path.name != "bindings.cpp"]  # it is for one Python alone
    compiled = [objects / f"{path.stem}.o" for path in sources]

    def compile_one(pair: tuple[Path, Path]) -> None:
        source, target = pair
        subprocess.run([compiler, *options, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(sources, compiled, strict=True)))
    library = folder / "repdeg_fast_cpu.so"
    torch_libraries = Path(torch.__file__).parent / "lib"  # found by name when loaded: PyTorch has them in the process
    link = ["-shared", "-Wl,--as-needed", f"-L{torch_libraries}", "-ltorch_cpu", "-s"]
    subprocess.run([compiler, *compiled, *link, "-o", library], check=True)
    facts = facts_of(compiler, flags, instruction_set)
    library.with_suffix(".json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return library


def facts_of(compiler: str, flags: list[str], instruction_set: str) -> Mapping[str, str]:
    """As ``build_info`` tells them of a library that was compiled here."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return {"compiler": version, "flags": " ".join(flags), "instruction_set": instruction_set, "cuda_architectures": ""}


def platform_tag(libraries: list[Path]) -> str:
    """By the newest glibc whose symbols are asked for."""
    needed = set()
    for library in libraries:
        symbols = subprocess.run(["readelf", "-V", library], check=True, capture_output=True, text=True).stdout
        needed |= {tuple(map(int, version)) for version in re.findall(r"GLIBC_(\d+)\.(\d+)", symbols)}
    major, minor = max(needed)
    return f"manylinux_{major}_{minor}_x86_64"


if __name__ == "__main__":
    sys.exit(main())
