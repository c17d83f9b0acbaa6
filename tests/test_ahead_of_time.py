"""Every Triton specialization and every .cu file compiles for the chips we name, without spills, on any machine."""

import os
import re
import shutil

import pytest

from repdeg_fast import native
from repdeg_fast.bench import resources

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

SPECIALIZATIONS = list(resources.specializations())
CUDA_TARGETS = [target for target in resources.TARGETS if target.startswith("sm_")]


def test_there_are_specializations():
    assert {s.kernel.__name__ for s in SPECIALIZATIONS} >= {"_forward_kernel", "_reduce_kernel", "_backward_kernel"}


@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize(
    "specialization",
    SPECIALIZATIONS,
    ids=lambda s: f"{s.kernel.__module__.split('.')[-1]}{s.kernel.__name__} {s.label}",
)
def test_triton(specialization, target):
    if specialization.targets and target not in specialization.targets:
        pytest.skip(f"is for {', '.join(specialization.targets)}")
    compiled = resources.compile_triton(specialization, target)
    assert compiled.spilled == 0
    assert compiled.shared_bytes <= resources.SHARED_MEMORY_LIMIT[target]
    assert compiled.registers > 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("target", CUDA_TARGETS)
@pytest.mark.parametrize("source", sorted((native.source_root() / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_cuda(source, target, tmp_path):
    report = resources.compile_cuda(source, target, tmp_path)
    assert report, "no kernel was compiled"
    assert {name: used.spilled for name, used in report.items() if used.spilled} == {}


def test_every_kernel_file_is_listed():
    """A Triton kernel that no specialization compiles would only be seen to fail on a GPU."""
    listed = {(s.kernel.__module__.split(".")[-1], s.kernel.__name__) for s in SPECIALIZATIONS}
    folder = os.path.dirname(__import__("repdeg_fast.triton_kernels", fromlist=["_"]).__file__)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                for kernel in re.findall(r"@triton\.jit\ndef (_\w+_kernel)\(", file.read()):
                    assert (name.removesuffix(".py"), kernel) in listed
