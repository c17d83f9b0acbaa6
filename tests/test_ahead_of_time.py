"""Every Triton specialization and every .cu file compiles for the chips we name, without spills, on any machine."""

import functools
import os
import re
import shutil

import check_versions
import kernel_resources as resources
import kernels
import pytest
from torch.utils import cpp_extension

from repdeg_fast.native import build

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
triton = pytest.importorskip("triton")

SPECIALIZATIONS = list(resources.specializations())
CUDA_SOURCES = sorted((build.source_root() / "cuda").glob("*.cu"))
# The assembler that Triton 3.6 brings gives up to 32 bytes of a thread to the stack where one more block then fits in.
SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6) else 32  # bytes
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
CUDA_TARGETS = [target for target in resources.TARGETS if target.startswith("sm_")]


def test_there_are_specializations():
    assert {s.kernel.__name__ for s in SPECIALIZATIONS} >= {"_forward_kernel", "_reduce_kernel", "_backward_kernel"}


@pytest.mark.parametrize(
    ("specialization", "target"),
    [(s, target) for s in SPECIALIZATIONS for target in s.targets or resources.TARGETS],
    ids=lambda x: x if isinstance(x, str) else f"{x.kernel.__module__.split('.')[-1]}{x.kernel.__name__} {x.label}",
)
def test_triton(specialization, target):
    compiled = resources.compile_triton(specialization, target)
    assert compiled.spilled <= SPILLED
    assert compiled.shared_bytes <= resources.SHARED_MEMORY_LIMIT[target]
    assert compiled.registers > 0


@pytest.fixture(scope="module")
def compiled_cuda(tmp_path_factory):
    """Each file once for each target: nvcc takes long."""
    return functools.cache(lambda source, target: resources.compile_cuda(source, target, tmp_path_factory.mktemp("cu")))


@needs_nvcc
@pytest.mark.parametrize("target", CUDA_TARGETS)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda(source, target, compiled_cuda):
    report = compiled_cuda(source, target)
    assert report, "no kernel was compiled"
    assert {name: used.spilled for name, used in report.items() if used.spilled} == {}


@needs_nvcc
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_host_code_of_cuda(source):
    """What launches the kernels: nvcc leaves it out above."""
    checked = resources.kept(source, "host code")
    if not checked.exists():
        assert check_versions.compile_errors(source, cpp_extension.include_paths(), "c++20") == ""
        checked.touch()


def test_every_kernel_file_is_listed():
    """A Triton kernel that no specialization compiles would only be seen to fail on a GPU."""
    listed = {(s.kernel.__module__.split(".")[-1], s.kernel.__name__) for s in SPECIALIZATIONS}
    folder = os.path.dirname(__import__("repdeg_fast.triton_kernels", fromlist=["_"]).__file__)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                for kernel in re.findall(r"@triton\.jit.*\ndef (_\w+_kernel)\(", file.read()):
                    assert (name.removesuffix(".py"), kernel) in listed


def small(kernel, types, divisible=(), **constants):
    import small_kernels
    from repdeg_fast.triton_kernels.tuning import Specialization

    return Specialization(getattr(small_kernels, kernel), types, constants, divisible=divisible)


@pytest.mark.parametrize(("divisible", "widths"), [(("n",), {16: 2}), ((), {4: 8})])
def test_widths_of_loads_and_stores_are_read(divisible, widths):
    copy = small("copy", {"out": "*fp32", "x": "*fp32", "n": "i32"}, divisible, BLOCK=1024)
    found = resources.compile_triton(copy, "sm_90")
    assert found.accesses("LDG") == found.accesses("STG") == widths
    assert found.accesses("LDGSTS") == found.matrix == {}
    assert (found.threads, found.spilled, found.shared_bytes, found.bulk_copies) == (128, 0, 0, 0)
    assert 8 <= found.registers <= 64


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTC"), ("gfx942", "v_mfma")]
)
def test_matrix_instructions_are_read(target, instruction):
    product = small("product", {"out": "*fp32", "a": "*fp16", "b": "*fp16"}, N=64)
    found = resources.compile_triton(product, target)
    assert all(name.startswith(instruction) for name in found.matrix), found.matrix
    assert sum(found.matrix.values()) > 0


@needs_nvcc
def test_cuda_kernels_are_read(tmp_path):
    import small_kernels

    source = tmp_path / "copy.cu"
    source.write_text(small_kernels.CUDA)
    (found,) = resources.compile_cuda(source, "sm_90", tmp_path).values()
    assert found.accesses("LDG") == found.accesses("STG") == {8: 1}
    assert (found.threads, found.spilled, found.shared_bytes) == (96, 0, 0)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "expected"),
    [
        (32, 0, 1024, (64, "threads")),
        (33, 0, 1024, (32, "registers")),
        (255, 0, 256, (8, "registers")),
        (96, 0, 192, (18, "registers")),  # 21 warps' registers, handed out to 4 at a time: 20, which is 3 blocks of 6
        (32, 100 << 10, 128, (8, "shared memory")),
        (32, 113 << 10, 128, (8, "shared memory")),  # 2 × (113 + 1) KiB is all there is
        (32, (113 << 10) + 1, 128, (4, "shared memory")),
        (16, 0, 32, (32, "blocks")),
    ],
)
def test_resident_warps(registers, shared, threads, expected):
    assert resources.H200.resident_warps(registers, shared, threads) == expected


@needs_nvcc
def test_the_committed_table_lists_the_kernels_that_there_are(compiled_cuda):
    cuda = {
        f"{source.stem} {kernels.cuda_name(name)}"
        for source in CUDA_SOURCES
        for name in compiled_cuda(source, kernels.TARGET)
    }
    listed = re.findall(r"^\| (\w.*?) \| \d", kernels.TABLE.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({*kernels.specializations(), *cuda}), "run `make tables`"
