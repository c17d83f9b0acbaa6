"""Run the CUDA kernels of ``csrc/cuda`` on CPU tensors (see ``cuda_emulation/cuda_runtime.h``), so that a machine
without a GPU tests their indexing and arithmetic. The sources are the shipped ones; only the launch syntax, which is
not C++, is rewritten."""

import functools
import re
from pathlib import Path

from repdeg_fast.native import build

HERE = Path(__file__).parent
NAMESPACE = "repdeg_fast_emulated"


@functools.cache
def load(folder):
    """Compile every ``.cu`` file for the CPU; the operators are then in ``torch.ops.repdeg_fast_emulated``."""
    from torch.utils import cpp_extension

    root = build.source_root()
    sources = []
    for path in [*root.glob("cuda/*.cuh"), *root.glob("cuda/*.cu"), *root.glob("*.h"), root / "registration.cpp"]:
        target = folder / (path.name if path.suffix != ".cu" else f"{path.stem}_cuda.cpp")
        target.write_text(_as_cpp(path.read_text()))
        if target.suffix == ".cpp":
            sources.append(str(target))
    flags = [*build.compile_flags(), "-O1", f"-I{HERE / 'cuda_emulation'}", "-Wno-unknown-pragmas"]
    objects = folder / "build"
    objects.mkdir()
    cpp_extension.load(
        "repdeg_fast_emulated", sources, extra_cflags=flags, build_directory=str(objects), is_python_module=False
    )


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
