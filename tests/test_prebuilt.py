"""Libraries that a wheel brings compiled: which one serves, and without a compiler."""

import platform
import sys
from collections.abc import Set

import prebuilt_wheel
import pytest
import torch

from repdeg_fast.native import build, prebuilt

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="there are wheels with libraries for x86-64 Linux"
)
V3, V4 = prebuilt.INSTRUCTION_SETS["x86-64-v3"], prebuilt.INSTRUCTION_SETS["x86-64-v4"]
SOURCE = """
#include <torch/csrc/stable/library.h>
static int64_t twice(int64_t x) { return 2 * x; }
STABLE_TORCH_LIBRARY(repdeg_fast_prebuilt_test, m) { m.def("twice(int x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_prebuilt_test, CompositeExplicitAutograd, m) {
  m.impl("twice", TORCH_BOX(&twice));
}
"""


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """A wheel with a file in the place of each library."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    monkeypatch.delenv("REPDEG_FAST_MARCH", raising=False)
    for name in prebuilt.INSTRUCTION_SETS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "repdeg_fast_cpu.so").touch()


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (V4 | {"avx512_bf16"}, "x86-64-v4"),
        (V4 - {"avx512vl"}, "x86-64-v3"),
        (V3, "x86-64-v3"),
        (V3 - {"fma"}, None),
        (frozenset(), None),
    ],
    ids=("avx512", "part of avx512", "avx2", "part of avx2", "nothing known"),
)
def test_the_processor_chooses(brought, flags: Set[str], chosen):
    found = prebuilt.library(frozenset(flags))
    assert (found and found.parent.name) == chosen


def test_what_the_processor_cannot_run_is_compiled(brought, monkeypatch):
    monkeypatch.setattr(build, "_instruction_set", lambda: "sse2")
    assert build._prebuilt("cpu") is None
    monkeypatch.setattr(build, "_instruction_set", lambda: " ".join(V3))
    assert build._prebuilt("cpu").parent.name == "x86-64-v3"
    assert build._prebuilt("cuda") is None


def test_an_instruction_set_that_is_named_is_compiled(brought, monkeypatch):
    monkeypatch.setenv("REPDEG_FAST_MARCH", "x86-64-v3")
    assert prebuilt.library(V4) is None


def test_a_tree_has_none():
    assert prebuilt.library(V4) is None


def test_loaded_without_a_compiler(tmp_path, monkeypatch):
    source = tmp_path / "registration.cpp"
    source.write_text(SOURCE)
    monkeypatch.setattr(build, "sources", lambda _: [source])
    library = prebuilt_wheel.compile_library(tmp_path / "built", tmp_path / "objects", "x86-64-v3")
    assert prebuilt_wheel.platform_tag([library]).startswith("manylinux_2_")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("_loaded", "_failures"):
        monkeypatch.setattr(build, name, {})
    monkeypatch.setattr(build, "_prebuilt", lambda name: library if name == "cpu" else None)
    assert (build.unavailable("cpu"), build.state("cpu")) == (None, "compiled")
    build.load("cpu")
    assert torch.ops.repdeg_fast_prebuilt_test.twice(21) == 42
    assert build.build_info("cpu")["instruction_set"] == "x86-64-v3"
    assert "-march=x86-64-v3" in build.build_info("cpu")["flags"].split()
    assert not (tmp_path / "cache").exists()
