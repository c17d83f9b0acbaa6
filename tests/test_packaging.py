"""A wheel built from the tree works outside the tree and owns one import name."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import repdeg_fast
from repdeg_fast.native import build

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "tests/check_install.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel, first on the path of a process that sees the environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    # from a copy: setuptools packs whatever an earlier build left in build/
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "benchmarks")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(command, cwd=tree, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_contents(site):
    top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"repdeg_fast"}
    installed = {str(path.relative_to(site / "repdeg_fast")) for path in (site / "repdeg_fast").rglob("*")}
    in_tree = [path for folder in ("csrc", "triton_kernels") for path in (ROOT / folder).rglob("*.[chp]*")]
    in_tree += (ROOT / "repdeg_fast").rglob("*.py")
    missing = {
        str(path.relative_to(ROOT)).removeprefix("repdeg_fast/") for path in in_tree if "__pycache__" not in path.parts
    } - installed
    assert not missing
    assert "py.typed" in installed


def test_runs_outside_the_tree(site, tmp_path):
    """With the library that the tree compiled: one of other sources would not be looked for under its name."""
    code = """
import importlib.util, torch, repdeg_fast
from repdeg_fast.native import build
print(repdeg_fast.__file__)
print(build._library_path("cpu"))
with repdeg_fast.use_backend("cpu"):
    print(repdeg_fast.cosine_regularization(torch.eye(3) + 1).item())
print(importlib.util.find_spec("triton_kernels"), importlib.util.find_spec("csrc"))
from repdeg_fast import triton_kernels
print(triton_kernels.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    where, library, value, names, kernels = result.stdout.splitlines()
    assert where.startswith(str(site))
    assert library == str(build._library_path("cpu"))
    assert float(value) == pytest.approx(5 / 9, rel=1e-6)
    assert names == "None None"
    assert kernels.startswith(str(site))


def test_import_costs_little():
    """The compiler alone takes a second; whoever compiles imports it then."""
    code = "import sys, torch; before = set(sys.modules); import repdeg_fast; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    packages = {name.split(".")[0] for name in result.stdout.split()}
    heavy = {"triton", "sympy", "transformers", "rich", "typer", "matplotlib", "setuptools"}
    assert not packages & heavy
    assert "torch._dynamo" not in result.stdout.split()


def test_torch_alone_suffices_to_train(tmp_path):
    """Without what compiles, shows and reads files; with nothing compiled, PyTorch serves, and says what is missing."""
    code = """
import sys
blocked = "matplotlib ninja numpy pybind11 rich safetensors scipy sklearn transformers typer"
sys.modules |= dict.fromkeys(blocked.split())
import torch, repdeg_fast
from repdeg_fast import nn
embedding, regularizer = torch.nn.Embedding(40, 8), nn.CosineRegularization()
head, mixture, block = nn.MultiLayerMLMHead(8, embedding), nn.GumbelMixture(8), nn.AdminNorm(8)
parameters = [p for module in (embedding, head, mixture, block) for p in module.parameters()]
optimizer = torch.optim.SGD(parameters, lr=0.1)
tokens = torch.arange(12).view(3, 4)
hidden = block(embedding(tokens), embedding(tokens + 1))
_, sampled = mixture(hidden.view(1, 12, 8), hidden.view(1, 12, 8), head.weight)
(head([hidden, hidden], tokens).sum() + sampled.square().sum() + regularizer(embedding)).backward()
optimizer.step()
print(all(p.grad is not None and p.isfinite().all() for p in parameters))
from repdeg_fast import analysis
print(analysis.pwcca(torch.randn(50, 4), torch.randn(50, 3)).distance > 0)
from repdeg_fast.cli import main
main()
"""
    environment = {**os.environ, "REPDEG_FAST_CACHE_DIR": str(tmp_path), "REPDEG_FAST_BACKEND": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["True", "True"], result.stderr
    assert "falls back to plain PyTorch" in result.stderr
    assert "pip install ninja pybind11" in result.stderr
    last = "repdeg-fast: the command line needs rich, safetensors, typer: pip install 'repdeg-fast[cli]'"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, last)


def test_the_version_stands_in_one_place(site):
    (metadata,) = site.glob("*.dist-info/METADATA")
    assert f"\nVersion: {repdeg_fast.__version__}\n" in metadata.read_text(encoding="utf-8")
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_installed_package_agrees_with_the_definition(site):
    """The script that releases are checked by, on the unpacked wheel."""
    code = f"import sys, runpy; sys.path.insert(0, {str(site)!r}); runpy.run_path({str(CHECK)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=site, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"in {site / 'repdeg_fast'}: works" in result.stdout


def test_the_workflow_runs_what_there_is():
    """Targets of make and sessions of nox, by their names."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["test"]["needs"] == jobs["docs"]["needs"] == "lint"  # what fails fastest comes first
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [run for run in runs if not run.startswith(("pip install ", "nox -s "))]
    assert {"make lint", "make docs", ".ci/run"} == set(commands)
    assert all(
        re.search(rf"^{run.removeprefix('make ')}:", makefile, re.MULTILINE) for run in commands if "make" in run
    )
    lines = jobs["matrix"]["strategy"]["matrix"]["include"]
    sessions = {line[key] for line in lines for key in ("session", "then") if key in line}
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    functions = {session: re.match(r"\w+", session)[0] for session in sessions}
    assert all(f"\ndef {name}(session" in noxfile for name in functions.values())
    assert {f'"{session.removeprefix("tests-")}"' for session in sessions if "tests-" in session} <= set(
        re.findall(r'"3\.\d+"', noxfile)
    )
