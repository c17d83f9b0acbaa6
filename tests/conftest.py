"""Which backend is tested where. ``make test`` runs this suite twice: once plainly, and once with TRITON_INTERPRET=1
and ``-m interpreter``, because Triton decides at import whether its kernels run on the CPU."""

import os

import pytest
import torch

# (backend, device) pairs that a kernel test runs on
PLACES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=pytest.mark.interpreter),
    pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda-gpu", marks=pytest.mark.gpu),
]


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", PLACES, indirect=True)


@pytest.fixture
def place(request):
    """The device to test on; operations are served by the backend under test meanwhile."""
    import repdeg_fast

    backend, device = request.param
    with repdeg_fast.use_backend(backend):
        yield Place(backend, device)


class Place:
    def __init__(self, backend, device):
        self.backend, self.device = backend, device

    def dtypes(self):
        """The dtypes that this backend takes. Triton's interpreter multiplies the raw bits of bfloat16."""
        if self.backend in ("reference", "cpu") and self.device == "cpu":
            return [torch.float32, torch.float64, torch.bfloat16, torch.float16]
        if self.device == "cpu":
            return [torch.float32, torch.float16]
        return [torch.float32, torch.bfloat16, torch.float16]


def pytest_collection_modifyitems(items):
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("interpreter") and not interpreter:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
