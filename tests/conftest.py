"""Which backend is tested where. ``make test`` runs this suite plainly; with TRITON_INTERPRET=1 and ``-m interpreter``,
because Triton decides at import whether its kernels run on the CPU; and with REPDEG_FAST_MARCH=x86-64-v3 and
``-m cpp``, because numerics that hold for one instruction set may not for another. What cannot run here is not
collected; one line at the end says how much that is, and why.

With ``-n`` (pytest-xdist) each worker is a process of one thread: as many as there are cores with ``-n auto``."""

import os
from collections import Counter

import emulate_cuda
import pytest
import torch

# (backend, device) pairs that a kernel test runs on
PLACES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu", marks=pytest.mark.cpp),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=pytest.mark.interpreter),
    pytest.param(("cuda-emulated", "cpu"), id="cuda-emulated"),
    pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda-gpu", marks=pytest.mark.gpu),
]


def pytest_generate_tests(metafunc):
    """A test module names the ``operation`` it tests, which is tested where it has kernels; a test marked ``gpu`` on
    GPUs alone."""
    if "place" in metafunc.fixturenames:
        limits = metafunc.module.operation.limits
        devices = {"cuda"} if metafunc.definition.get_closest_marker("gpu") else {"cpu", "cuda"}
        served = [p for p in PLACES if p.values[0][0].removesuffix("-emulated") in limits and p.values[0][1] in devices]
        metafunc.parametrize("place", served, indirect=True)


@pytest.fixture
def place(request, threads):
    """The device to test on; operations are served by the backend under test meanwhile."""
    import repdeg_fast

    backend, device = request.param
    if backend == "cuda-emulated":
        request.getfixturevalue("emulated_cuda")
    if backend == "cpu":  # also where processes take the place of threads
        threads(max(torch.get_num_threads(), 2))
    with repdeg_fast.use_backend(backend):
        yield Place(backend, device)


@pytest.fixture(scope="session")
def emulated_cuda():
    """A backend ``cuda-emulated`` that takes CPU tensors: the CUDA kernels in emulation."""
    from repdeg_fast import backends

    emulate_cuda.load()

    class Emulated(backends.Backend):
        def unavailable(self, device):
            return None if device == "cpu" else "runs on CPU tensors only"

        def kernels(self, operation):
            return operation.native(getattr(torch.ops, emulate_cuda.NAMESPACE))

    backends.register(Emulated("cuda-emulated", kernels_of="cuda"))


class Place:
    def __init__(self, backend, device):
        self.backend, self.device = backend, device

    def skip_unless_served(self, operation, *tensors):
        """Some kernels take some layouts only. What they refuse must be an error that says so; then there is no more
        to test here."""
        if operation.unavailable(self.backend, self.device, *tensors):
            with pytest.raises(RuntimeError, match=f"'{self.backend}' cannot serve {operation.name}"):
                operation.kernels(self.backend, *tensors)
            pytest.skip(operation.unavailable(self.backend, self.device, *tensors))

    def dtypes(self):
        """The dtypes that this backend takes. Triton's interpreter multiplies the raw bits of bfloat16."""
        if self.backend.startswith("cuda"):
            return [torch.float32, torch.bfloat16, torch.float16]
        if self.backend in ("reference", "cpu") and self.device == "cpu":
            return [torch.float32, torch.float64, torch.bfloat16, torch.float16]
        if self.device == "cpu":
            return [torch.float32, torch.float16]
        return [torch.float32, torch.bfloat16, torch.float16]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One for each core that this process may use; psutil would say how many there are without hyperthreads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        import fast_interpreter

        fast_interpreter.install()
    if getattr(config.option, "numprocesses", None):  # before the workers start, which inherit it
        os.environ.setdefault("OMP_NUM_THREADS", "1")


_left_out = pytest.StashKey()  # reason -> how many tests


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    named = "convergence" in config.option.markexpr
    reasons = {item: _cannot_run(item, named) for item in items}
    config.stash[_left_out] = Counter(filter(None, reasons.values()))
    config.hook.pytest_deselected(items=[item for item, reason in reasons.items() if reason])
    items[:] = [item for item, reason in reasons.items() if not reason]


def _cannot_run(item, convergence):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "need an NVIDIA GPU (`make gpu`)"
    if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
        return "need TRITON_INTERPRET=1 (the second run of `make test`)"
    if item.get_closest_marker("convergence") and not convergence:
        return "take minutes (`make convergence`)"
    return None


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(_left_out, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker collects the same tests: one of them tells what it left out."""
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    """One line for what was not collected, and one for each reason that a test gave for skipping itself."""
    if left_out := config.stash.get(_left_out, None):
        terminalreporter.line("not run here: " + "; ".join(f"{n} tests {reason}" for reason, n in left_out.items()))
    reports = terminalreporter.stats.get("skipped", [])
    for reason, n in Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports).items():
        terminalreporter.line(f"skipped: {n} × {reason}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Tensors of the smallest models only make threads wait for one another."""
    threads(1)
