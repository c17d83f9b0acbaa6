"""Compile, cache and load the C++ and CUDA kernels of ``csrc/``.

Two libraries, so that a CPU user never waits for nvcc: ``cpu`` (schemas, C++ kernels) and ``cuda`` (CUDA kernels).
Each is compiled on first use with ninja through :mod:`torch.utils.cpp_extension` and kept in a folder named after
everything that decides its contents; a file lock lets one process compile while the others wait.
:mod:`~repdeg_fast.native.cache` is that folder. A wheel may bring ``cpu``: :mod:`~repdeg_fast.native.prebuilt`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from repdeg_fast.native import cache
from repdeg_fast.native.prebuilt import Prebuilt
from repdeg_fast.native.prebuilt import library as prebuilt_library

LIBRARIES = ("cpu", "cuda")
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # stable ABI of torch 2.10: one build serves all later ones


def operators(op: str, *functions: str, namespace: Any = None) -> SimpleNamespace:
    """The native kernels of ``op``: ``operators("cosreg", "forward").forward`` is the C++ operator cosreg_forward."""
    namespace = namespace or torch.ops.repdeg_fast_native
    return SimpleNamespace(**{name: getattr(namespace, f"{op}_{name}").default for name in functions})


def unavailable(library: str) -> str | None:
    """Why ``library`` cannot serve on this machine, with the remedy, or ``None``. Compiles nothing."""
    if library in _loaded:
        return None
    if library in _failures:
        return _failures[library]
    if _prebuilt(library):
        return None
    if library == "cuda" and (reason := _cuda_unavailable()):
        return reason
    try:
        compiled = cache.is_whole(_library_path(library))
    except FileNotFoundError as error:
        return str(error)
    return None if compiled else _compiler_missing(library)


def load(library: str) -> ModuleType | Prebuilt:
    """The loaded library, compiled first if need be. Raises ``RuntimeError`` with the reason and the remedy."""
    if library in _loaded:
        return _loaded[library]
    if library == "cuda":
        load("cpu")  # holds the operator schemas that the CUDA kernels are registered for
    with _loading:
        if library in _loaded:  # another thread's work
            return _loaded[library]
        if reason := unavailable(library):
            raise RuntimeError(reason)
        try:
            ready = _prebuilt(library)
            _loaded[library] = Prebuilt(ready) if ready else _build_and_import(library)
        except Exception as error:
            remedy = f"check {cache.cache_root()}, or name another folder by REPDEG_FAST_CACHE_DIR"
            remedy = remedy if isinstance(error, OSError) else _remedy(library)
            _failures[library] = f"compiling the {library} kernels failed: {error}; {remedy}"
            raise RuntimeError(_failures[library]) from error
    return _loaded[library]


def build_info(library: str = "cpu") -> dict[str, str]:
    """Compiler, flags, instruction set and CUDA architectures that the loaded ``library`` was built with."""
    return dict(load(library).build_info())


def state(library: str) -> str:
    """``"loaded"``, ``"compiled"``, ``"will be compiled on first use"``, or why it is not available."""
    if library in _loaded:
        return "loaded"
    if _prebuilt(library):
        return "compiled"
    if reason := unavailable(library):
        return reason
    return "compiled" if cache.is_whole(_library_path(library)) else "will be compiled on first use"


def _prebuilt(library: str) -> Path | None:
    return prebuilt_library(frozenset(_instruction_set().split())) if library == "cpu" else None


_loading = threading.Lock()
_loaded: dict[str, ModuleType | Prebuilt] = {}
_failures: dict[str, str] = {}


def _remedy(library: str) -> str:
    return {
        "cpu": "install a C++17 compiler (g++ or clang++; CXX names another), and pip install ninja pybind11",
        "cuda": "install the CUDA toolkit of torch's CUDA version (CUDA_HOME names it), and pip install ninja pybind11",
    }[library]


def _cuda_unavailable() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


@functools.cache
def _compiler_missing(library: str) -> str | None:
    cpp_extension = _cpp_extension()
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on PATH); {_remedy('cpu')}"
    if library == "cuda" and cpp_extension.CUDA_HOME is None:
        return f"no nvcc; {_remedy('cuda')}"
    with _ninja_on_path():
        if not cpp_extension.is_ninja_available():
            return f"no ninja; {_remedy(library)}"
    if importlib.util.find_spec("pybind11") is None:
        return f"no pybind11; {_remedy(library)}"
    return None


def _cpp_extension() -> Any:
    """``torch.utils.cpp_extension``, whose import warns that there is no GPU: we say so where it matters."""
    log = logging.getLogger("torch.utils.cpp_extension")
    before, log.disabled = log.disabled, True
    try:
        from torch.utils import cpp_extension
    finally:
        log.disabled = before
    return cpp_extension


@functools.cache
def source_root() -> Path:
    """``csrc/``: beside the package in a source tree, inside it once installed."""
    package = Path(__file__).parent.parent
    for root in (package / "csrc", package.parent / "csrc"):
        if (root / "registration.cpp").exists():
            return root
    raise FileNotFoundError("the C++ sources (csrc) are not there; pip install repdeg-fast brings them")


def sources(library: str) -> list[Path]:
    root = source_root()
    if library == "cpu":
        return [root / "bindings.cpp", root / "registration.cpp", *sorted(root.glob("cpu/*.cpp"))]
    return [root / "bindings.cpp", *sorted(root.glob("cuda/*.cu"))]


def compile_flags() -> list[str]:
    """No ``-ffast-math``: NaN and Inf must pass through. ``omp simd`` is what lets sums be vectorized instead.

    ``REPDEG_FAST_MARCH`` names the instruction set (``x86-64-v3``, say) where it is not to be this machine's own.
    """
    option = "-mcpu" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "-march"
    instruction_set = os.environ.get("REPDEG_FAST_MARCH") or "native"
    return ["-O3", f"{option}={instruction_set}", "-fopenmp-simd", "-fno-math-errno", _TORCH_TARGET]


def cuda_flags() -> list[str]:
    return ["-O3", "-lineinfo", "-DUSE_CUDA", _TORCH_TARGET]


def _cuda_architectures() -> str:
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


@functools.cache
def _processor_facts() -> dict[str, str]:
    """Of the first processor of /proc/cpuinfo, by lower-case name; {} where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _instruction_set() -> str:
    facts = _processor_facts()
    return facts.get("flags") or facts.get("features") or platform.processor()


def processor() -> str:
    """Its name, with a digest of its instruction set: virtual machines hide parts of one."""
    name = _processor_facts().get("model name") or platform.processor() or platform.machine()
    return f"{name} ({hashlib.sha256(_instruction_set().encode()).hexdigest()[:8]})"


@functools.cache
def _library_path(library: str) -> Path:
    """Where the compiled library lies: a folder named after sources, flags, torch, Python and the host's ISA."""
    digest = hashlib.sha256()
    for path in sorted(source_root().rglob("*")):
        if path.suffix in {".cpp", ".cu", ".h", ".cuh"}:
            digest.update(path.name.encode() + path.read_bytes())
    facts = [library, *compile_flags(), torch.__version__, sysconfig.get_config_var("EXT_SUFFIX"), _instruction_set()]
    if library == "cuda":
        facts += [*cuda_flags(), str(torch.version.cuda), _cuda_architectures()]
    digest.update("\0".join(map(str, facts)).encode())
    return cache.cache_root() / digest.hexdigest()[:16] / f"repdeg_fast_{library}.so"


def _build_and_import(library: str) -> ModuleType:
    path = _library_path(library)
    cache.make_folder(path.parent)
    if not cache.is_whole(path):
        with cache.exclusive(path.parent / "lock"):
            if not cache.is_whole(path):  # another process may have compiled it while this one waited
                return _compile(library, path)
    try:
        return _import(path)
    except ImportError:  # compiled on a machine that shares this folder and has other libraries
        with cache.exclusive(path.parent / "lock"):
            return _compile(library, path)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(library: str, path: Path) -> ModuleType:
    """Build in a folder of its own, then move the result into place: a killed build leaves nothing half-made."""
    print(f"repdeg_fast: compiling the {library} kernels (once)...", end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    build = path.parent / "build"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir()
    try:
        module = _run_compiler(library, path.stem, build)
    except RuntimeError as error:  # its text is all that the compiler printed
        print("failed", file=sys.stderr, flush=True)
        log = path.with_suffix(".log")
        log.write_text(str(error), encoding="utf-8")
        raise RuntimeError(f"{_first_error(str(error))} (all of it: {log})") from None
    cache.keep(build / path.name, path)
    shutil.rmtree(build, ignore_errors=True)
    print(f"done in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return module


def _run_compiler(library: str, name: str, build: Path) -> ModuleType:
    import pybind11

    cpp_extension = _cpp_extension()
    architectures = _cuda_architectures() if library == "cuda" else ""
    flags = " ".join(compile_flags() + (cuda_flags() if library == "cuda" else []))
    (build / "build_config.h").write_text(
        f'#define REPDEG_FAST_FLAGS "{flags}"\n#define REPDEG_FAST_CUDA_ARCHITECTURES "{architectures}"\n'
    )
    with _ninja_on_path(), tempfile.TemporaryDirectory() as links:
        root, build = _plain_path(source_root(), f"{links}/csrc"), _plain_path(build, f"{links}/build")
        module: ModuleType = cpp_extension.load(
            name=name,
            sources=[str(root / source.relative_to(source_root())) for source in sources(library)],
            extra_cflags=compile_flags(),
            extra_cuda_cflags=cuda_flags(),
            extra_include_paths=[str(build), pybind11.get_include()],
            build_directory=str(build),
        )
    return module


def _plain_path(path: Path, link: str) -> Path:
    """``path``, or ``link``, made to lead there, if ninja or a shell would read something in it as their own."""
    if re.fullmatch(r"[\w@%+=,./-]+", str(path), re.ASCII):
        return path
    os.symlink(path, link, target_is_directory=True)
    return Path(link)


def _first_error(output: str) -> str:
    """The line to start at in the output of a compiler and linker."""
    lines = output.splitlines()
    return next((line.strip() for line in lines if re.search(r"(error|fatal) *:|undefined reference", line)), lines[-1])


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Make the ninja of this environment visible even when the environment was not activated."""
    before = os.environ.get("PATH", "")
    with suppress(ImportError):  # the system's own will do
        import ninja

        os.environ["PATH"] = before + os.pathsep + ninja.BIN_DIR
    try:
        yield
    finally:
        os.environ["PATH"] = before
