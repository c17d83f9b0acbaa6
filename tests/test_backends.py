"""Choice of backend, fallbacks, and the state that ``status`` reports."""

import os
import subprocess
import sys

import pytest
import torch

import repdeg_fast
from repdeg_fast import backends
from repdeg_fast.native import build

WEIGHT = torch.randn(6, 4)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_unknown_names():
    with (
        pytest.raises(ValueError, match=r"name: expected one of reference, cpu, triton, cuda.* or auto, got 'mkl'"),
        repdeg_fast.use_backend("mkl"),
    ):
        pass
    result = run("import repdeg_fast", REPDEG_FAST_BACKEND="mkl")
    assert "ValueError: REPDEG_FAST_BACKEND: expected one of" in result.stderr


def test_environment_variable_and_nesting():
    code = "import repdeg_fast as r; print(r.backends.requested(), r.backends.status()['cosreg']['cpu']['serves'])"
    assert run(code, REPDEG_FAST_BACKEND="reference").stdout.split() == ["reference", "reference"]
    assert run(code, REPDEG_FAST_BACKEND="").stdout.split()[0] == "auto"
    with repdeg_fast.use_backend("reference"):
        with repdeg_fast.use_backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reasons below are those of a machine without a GPU")
def test_a_backend_that_cannot_serve_says_why():
    with repdeg_fast.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot serve cosreg on cpu"):
        repdeg_fast.cosine_regularization(WEIGHT)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with repdeg_fast.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            repdeg_fast.cosine_regularization(WEIGHT)


def test_status_names_every_backend():
    table = backends.status()
    assert set(table) >= {"cosreg"}
    for devices in table.values():
        for row in devices.values():
            assert row["reference"] is None
            assert row["serves"] in backends.BACKENDS
            assert set(row) == {"serves", *backends.BACKENDS}


def test_no_compiler_falls_back_with_one_warning(tmp_path):
    """Everything still correct, said once, with the remedy."""
    code = """
import torch, warnings, repdeg_fast
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    values = [repdeg_fast.cosine_regularization(torch.eye(4) + 1).item() for _ in range(3)]
print(len(caught), caught[0].message, values[0])
"""
    result = run(code, CXX="no-such-compiler", REPDEG_FAST_CACHE_DIR=str(tmp_path))
    count, message = result.stdout.split(" ", 1)
    assert count == "1"
    assert "falls back to plain PyTorch" in message
    assert "install a C++17 compiler" in message
    assert float(message.split()[-1]) == pytest.approx(12 * (6 / 7) / 16, rel=1e-6)


def test_a_build_that_fails_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "compile_flags", lambda: ["-DTORCH_TARGET_VERSION=0", "-fno-such-flag"])
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_failures", {})
    build._library_path.cache_clear()
    with pytest.raises(RuntimeError, match=r"compiling the cpu kernels failed; install .*no-such-flag"):
        build.load("cpu")
    assert "no-such-flag" in build.unavailable("cpu")
    assert backends.status()["cosreg"]["cpu"]["serves"] == "reference"
    build._library_path.cache_clear()


def test_a_build_that_fails_falls_back(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "compile_flags", lambda: ["-fno-such-flag"])
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_failures", {})
    build._library_path.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"falls back to plain PyTorch: cpu: compiling the cpu kernels failed"):
        backends.forget()
        assert repdeg_fast.cosine_regularization(torch.eye(2)).item() == 0
    build._library_path.cache_clear()
    backends.forget()


def test_a_library_that_does_not_load_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    build._library_path.cache_clear()
    path = build._library_path("cpu")
    build._library_path.cache_clear()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    result = run(
        "from repdeg_fast.native import build; print(build.build_info()['flags'])", REPDEG_FAST_CACHE_DIR=str(tmp_path)
    )
    assert "-O3" in result.stdout, result.stderr


def test_no_home_and_no_ninja_package():
    code = """
import os, pwd, sys
sys.modules["ninja"] = None
pwd.getpwuid = lambda uid: {}[uid]
for name in ("HOME", "XDG_CACHE_HOME", "REPDEG_FAST_CACHE_DIR"):
    os.environ.pop(name, None)
from repdeg_fast.native import build
print(build.cache_root(), build.state("cpu"))
"""
    result = run(code)
    assert f"repdeg_fast-{os.getuid()}" in result.stdout, result.stderr


def test_build_info():
    info = build.build_info()
    assert set(info) == {"compiler", "flags", "instruction_set", "cuda_architectures"}
    assert "-O3" in info["flags"]
    assert "-ffast-math" not in info["flags"]
    assert build.state("cpu") == "loaded"


def test_processes_that_compile_at_once_share_one_build(tmp_path):
    code = "from repdeg_fast.native import build; build.load('cpu'); print(build.build_info()['compiler'])"
    environment = {**os.environ, "REPDEG_FAST_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    assert sum("compiling" in stderr for _, stderr in results) == 1
    libraries = list(tmp_path.rglob("*.so"))
    assert len(libraries) == 1
    assert not list(tmp_path.rglob("*.o"))


def test_cache_follows_flags_and_sources(monkeypatch):
    build._library_path.cache_clear()
    before = build._library_path("cpu")
    monkeypatch.setattr(build, "compile_flags", lambda: ["-O2"])
    build._library_path.cache_clear()
    assert build._library_path("cpu") != before
    build._library_path.cache_clear()
