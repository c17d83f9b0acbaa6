"""Choice of backend, fallbacks, and the state that ``status`` reports."""

import os
import subprocess
import sys

import pytest
import torch

import repdeg_fast
from repdeg_fast import backends
from repdeg_fast.ops import neighbours  # noqa: F401  registers its operation
from repdeg_fast.ops.linear import linear

WEIGHT = torch.randn(6, 4)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_unknown_names():
    with pytest.raises(ValueError, match=r"name: expected one of reference, cpu, triton, cuda.* or auto, got 'mkl'"):
        repdeg_fast.use_backend("mkl")


@pytest.mark.parametrize("call", [lambda: repdeg_fast.cosine_regularization(WEIGHT), backends.status])
def test_an_unknown_name_in_the_environment_is_named_at_the_first_call(call, monkeypatch):
    monkeypatch.setattr(backends, "requested", lambda: "mkl")  # what an import has read of the environment
    with pytest.raises(ValueError, match=r"REPDEG_FAST_BACKEND: expected one of reference, .* or auto, got 'mkl'"):
        call()


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
    values = [repdeg_fast.CosineRegularization()(torch.eye(4) + 1).item() for _ in range(3)]
print(len(caught), caught[0].filename, caught[0].message, values[0])
"""
    result = run(code, CXX="no-such-compiler", REPDEG_FAST_CACHE_DIR=str(tmp_path))
    count, place, message = result.stdout.split(" ", 2)
    assert (count, place) == ("1", "<string>")  # of the caller, not a line in here
    assert "falls back to plain PyTorch" in message
    assert "install a C++17 compiler" in message
    assert float(message.split()[-1]) == pytest.approx(12 * (6 / 7) / 16, rel=1e-6)


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setenv("REPDEG_FAST_STRICT", "1")


@pytest.fixture
def no_cpu_kernels(monkeypatch):
    backends.forget()
    monkeypatch.setattr(backends.build, "unavailable", lambda library: "no C++ compiler; install one")
    yield
    backends.forget()


STRICT = "no C\\+\\+ compiler; install one.*REPDEG_FAST_STRICT=1"


def test_strict_makes_a_fallback_an_error(strict, no_cpu_kernels):
    with pytest.raises(RuntimeError, match=f"cosreg on cpu falls back to plain PyTorch: cpu: {STRICT}"):
        repdeg_fast.cosine_regularization(WEIGHT)
    with pytest.raises(RuntimeError, match=f"a linear layer on cpu is PyTorch's own: {STRICT}"):
        linear(WEIGHT, WEIGHT, None)
    with repdeg_fast.use_backend("reference"):  # asked for: no fallback
        repdeg_fast.cosine_regularization(WEIGHT)


def test_strict_asks_for_the_first_backend_that_has_kernels(strict, monkeypatch):
    """Triton for an operation with CUDA kernels is a fallback; for one that has none it is not."""
    cosreg, pairwise = (backends._operations[name] for name in ("cosreg", "pairwise"))
    backends._warn_once.cache_clear()
    monkeypatch.setattr(backends.Operation, "unavailable", lambda self, name, device, *_: f"{name} is not there")
    pairwise._announce_fallback("triton", "cuda", WEIGHT)
    with pytest.raises(RuntimeError, match="cosreg on cuda falls back to triton: cuda: cuda is not there"):
        cosreg._announce_fallback("triton", "cuda", WEIGHT)
    with pytest.warns(RuntimeWarning, match="neighbours on cuda falls back to plain PyTorch"):
        backends._operations["neighbours"]._announce_fallback("reference", "cuda", WEIGHT)


def test_strict_and_what_else_is_announced(strict, tmp_path, monkeypatch):
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    with pytest.raises(RuntimeError, match=r"admin_norm: weight has an entry near zero.*REPDEG_FAST_STRICT=1"):
        repdeg_fast.admin_norm(WEIGHT, WEIGHT, weight=weight)
    repdeg_fast.admin_norm(WEIGHT, WEIGHT, weight=weight, save="input")
    (tmp_path / "tuning.json").write_text("[")
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    backends._load_tuning.cache_clear()
    with pytest.raises(RuntimeError, match=r"tuning\.json cannot be read.*REPDEG_FAST_STRICT=1"):
        backends._load_tuning()


def test_nothing_here_is_a_fallback(strict):
    """All operations have kernels for this machine, compiled or to be compiled."""
    for operation, devices in backends.status().items():
        assert devices["cpu"]["serves"] == "cpu", operation
    repdeg_fast.cosine_regularization(WEIGHT)
