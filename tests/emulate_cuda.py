"""Run the CUDA kernels of ``csrc/cuda`` on CPU tensors (see ``cuda_emulation/cuda_runtime.h``), so that a machine
without a GPU tests their indexing and arithmetic. The sources are the shipped ones; only the launch syntax, which is
not C++, is rewritten."""

import functools
import hashlib
import re
import tempfile
from pathlib import Path

import torch

from repdeg_fast.native import build, cache

HERE = Path(__file__).parent
NAMESPACE = "repdeg_fast_emulated"


@functools.cache
def load():
    """Load the kernels, compiled by whichever process came first and kept in a folder of the cache that is named after
    everything that decides their code; the operators are then in ``torch.ops.repdeg_fast_emulated``."""
    sources, flags = _sources(), [*build.compile_flags(), "-O1", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    headers = {path.name: path.read_text() for path in sorted((HERE / "cuda_emulation").iterdir())}
    facts = repr((sources, headers, flags, torch.__version__))
    library = cache.cache_root() / f"emulated-{hashlib.sha256(facts.encode()).hexdigest()[:16]}" / f"{NAMESPACE}.so"
    cache.make_folder(library.parent)
    with cache.exclusive(library.parent / "lock"):
        if cache.is_whole(library):
            torch.ops.load_library(library)
        else:
            _compile_and_load(sources, flags, library)


def _sources():
    """The files to compile by their names, and what they include, but for what the emulation has in its place."""
    root = build.source_root()
    paths = [*root.glob("cuda/*.cuh"), *root.glob("cuda/*.cu"), *root.glob("*.h"), root / "registration.cpp"]
    paths = [path for path in paths if not (HERE / "cuda_emulation" / path.name).exists()]
    names = {path: path.name if path.suffix != ".cu" else f"{path.stem}_cuda.cpp" for path in sorted(paths)}
    return {name: _as_cpp(path.read_text()) for path, name in names.items()}


def _compile_and_load(sources, flags, library):
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        cpp_extension.load(
            NAMESPACE,
            [str(Path(folder, name)) for name in sources if name.endswith(".cpp")],
            extra_cflags=[*flags, f"-I{HERE / 'cuda_emulation'}"],
            build_directory=folder,
            is_python_module=False,
        )
        cache.keep(Path(folder, library.name), library)


def _as_cpp(source):
    source = re.sub(r"(\w+(?:<[\w:, ]+>)?)<<<(.*?)>>>\(", r"::emulation::launch(\1, \2)(", source, flags=re.S)
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(::emulation::dynamic_shared.data());",
        source,
    )
    source = source.replace("#include <torch/csrc/stable/macros.h>", "")  # the emulation has its STD_CUDA_CHECK
    source = source.replace("torch::stable::accelerator::DeviceGuard", "::emulation::DeviceGuard")
    source = source.replace("aoti_torch_get_current_cuda_stream", "::emulation::current_stream")
    source = source.replace("repdeg_fast_native, CUDA", f"{NAMESPACE}, CPU").replace("repdeg_fast_native", NAMESPACE)
    return source.replace("../philox.h", "philox.h")
