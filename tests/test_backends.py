"""Choice of backend, fallbacks, and the state that ``status`` reports."""

import os
import subprocess
import sys

import pytest
import torch

import repdeg_fast
from repdeg_fast import backends

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
