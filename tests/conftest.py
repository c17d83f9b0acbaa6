"""Which backend is tested where. ``make test`` runs this suite twice: once plainly, and once with TRITON_INTERPRET=1
and ``-m interpreter``, because Triton decides at import whether its kernels run on the CPU."""

import os

import emulate_cuda
import pytest
import torch

# (backend, device) pairs that a kernel test runs on
PLACES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=pytest.mark.interpreter),
    pytest.param(("cuda", "cpu"), id="cuda-emulated"),
    pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda-gpu", marks=pytest.mark.gpu),
]


def pytest_generate_tests(metafunc):
    """A test module names the ``operation`` it tests, which is tested where it has kernels."""
    if "place" in metafunc.fixturenames:
        backends = {"reference", *metafunc.module.operation.backends}
        metafunc.parametrize("place", [p for p in PLACES if p.values[0][0] in backends], indirect=True)


@pytest.fixture
def place(request):
    """The device to test on; operations are served by the backend under test meanwhile."""
    import repdeg_fast

    backend, device = request.param
    if (backend, device) == ("cuda", "cpu"):
        request.getfixturevalue("emulated_cuda")
    with repdeg_fast.use_backend(backend):
        yield Place(backend, device)


@pytest.fixture(scope="session")
def _cuda_built_for_the_cpu(tmp_path_factory):
    emulate_cuda.load(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture
def emulated_cuda(_cuda_built_for_the_cpu, monkeypatch):
    """The ``cuda`` backend takes CPU tensors: its kernels run in emulation."""
    from repdeg_fast import backends

    implementation, environment = backends._implementation, backends._environment

    def emulated(operation, backend):
        if backend == "cuda":
            return emulate_cuda.operators(operation.name, *operation.functions)
        return implementation(operation, backend)

    monkeypatch.setattr(backends, "_implementation", emulated)
    monkeypatch.setattr(backends, "_environment", lambda b, d: None if b == "cuda" else environment(b, d))


class Place:
    def __init__(self, backend, device):
        self.backend, self.device = backend, device

    def skip_unless_served(self, operation, *tensors):
        """Some kernels take some layouts only. What they refuse must be an error that says so; then there is no more
        to test here."""
        if operation.unavailable(self.backend, self.device, *tensors):
            with pytest.raises(RuntimeError, match=f"'{self.backend}' cannot serve {operation.name}"):
                operation.choose(self.backend, *tensors)
            pytest.skip(operation.unavailable(self.backend, self.device, *tensors))

    def dtypes(self):
        """The dtypes that this backend takes. Triton's interpreter multiplies the raw bits of bfloat16."""
        if self.backend == "cuda":
            return [torch.float32, torch.bfloat16, torch.float16]
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


@pytest.fixture
def one_thread():
    """Tensors of the smallest models only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
