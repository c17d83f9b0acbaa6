"""The build for a kernel hub: loaded from another folder, under another name, beside the package."""

import importlib.util
import pkgutil
import re
import sys

import hub_build
import pytest
import torch

import repdeg_fast
from repdeg_fast.ops import _operator


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = hub_build.write(tmp_path_factory.mktemp("hub"))
    spec = importlib.util.spec_from_file_location("from_a_hub", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["from_a_hub"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "from_a_hub"]:
        del sys.modules[name]


def test_every_module_imports_nothing_but_its_own(loaded):
    for found in pkgutil.walk_packages(loaded.__path__, "from_a_hub."):
        text = importlib.util.find_spec(found.name).loader.get_source(found.name)
        assert not re.search(r"^ *(from|import) repdeg_fast\b", text, re.MULTILINE), found.name
        importlib.import_module(found.name)
    assert set(loaded.__all__) == set(repdeg_fast.__all__) - {"data", "models"}
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_its_operators_are_its_own(loaded):
    namespace = loaded.functional.admin_norm.__globals__["_admin_norm"].overload.namespace
    assert re.fullmatch(r"repdeg_fast_[0-9a-f]{8}", namespace)
    assert _operator.NAMESPACE == "repdeg_fast"
    assert hasattr(getattr(torch.ops, namespace), "cosreg")


@pytest.mark.filterwarnings("ignore:repdeg_fast. .* falls back to plain PyTorch")
def test_it_computes_the_same(loaded):
    weight = torch.randn(30, 8, requires_grad=True)
    x, target = torch.randn(5, 8), torch.randint(30, (5,))
    gradients = []
    for package in (loaded, repdeg_fast):
        loss = package.linear_cross_entropy(x, weight, target) + package.CosineRegularization()(weight)
        loss = loss + package.contrastive_loss(x, weight[:5])
        gradients += torch.autograd.grad(loss, weight)
    torch.testing.assert_close(*gradients)


def test_it_says_that_it_has_no_sources(loaded):
    status = loaded.backends.status()["cosreg"]["cpu"]
    assert "sources (csrc) are not there" in status["cpu"]
    assert status["serves"] == "reference"


@pytest.mark.interpreter
def test_its_triton_kernels_run(loaded):
    weight = torch.randn(30, 8)
    with loaded.use_backend("triton"):
        found = loaded.cosine_regularization(weight)
    torch.testing.assert_close(found, repdeg_fast.cosine_regularization(weight))
