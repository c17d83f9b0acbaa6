"""What all operators have in common: how they are called, what they refuse, and that they leave each other's tensors
alone. tests/support.py has their calls."""

import threading

import pytest
import support
import torch

import repdeg_fast
from repdeg_fast import backends
from repdeg_fast.ops import cosreg
from repdeg_fast.ops._operator import Operator

NAMES = (
    "admin_norm",
    "contrastive_loss",
    "cosine_regularization",
    "gumbel_mix",
    "linear_cross_entropy",
    "mlm_losses_and_sample",
    "pairwise_cosine",
    "pairwise_max_cosine",
)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def call(name):
    return lambda *tensors: support.OPERATIONS[name].function(*tensors, 0.25, 1)


@pytest.fixture
def inputs(name):
    return support.OPERATIONS[name].tensors(6)


def test_same_through_the_dispatcher(call, inputs):
    """What compilers and modes see is what a plain call computes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looking(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, str(func))
            return func(*args, **(kwargs or {}))

    plain = torch.autograd.grad(_sum(call(*inputs)), inputs, materialize_grads=True)
    with Looking() as mode:
        seen = torch.autograd.grad(_sum(call(*inputs)), inputs, materialize_grads=True)
    assert any(operator.startswith("repdeg_fast.") for operator in mode.seen)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_gradients_at_once(call, inputs):
    """``is_grads_batched``, of which ``jacobian(vectorize=True)`` is made, goes by torch's older vmap."""
    value, factors = _sum(call(*inputs)), torch.tensor([1.0, -2.0], dtype=inputs[0].dtype)
    found = torch.autograd.grad(value, inputs, factors, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for several, one in zip(found, torch.autograd.grad(value, inputs, allow_unused=True), strict=True):
        if one is not None:
            torch.testing.assert_close(several, torch.stack([one, -2 * one]))


def test_distributed_parameters_are_served_or_a_clear_error(name, call, inputs, one_process_mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = call(*inputs)
    inputs[-1] = distribute_tensor(inputs[-1], one_process_mesh, [Shard(0)])
    if name in ("cosine_regularization", "gumbel_mix"):  # whose last input is a vocabulary
        return torch.testing.assert_close(call(*inputs), whole)
    with pytest.raises(TypeError, match=r"\w+: expected a plain tensor, got a DTensor .* pass \w+\.full_tensor\(\)"):
        call(*inputs)


@pytest.fixture(scope="module")
def one_process_mesh():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_threads_have_backends_of_their_own(call, inputs):
    entered, leave = threading.Event(), threading.Event()

    def inside():
        with repdeg_fast.use_backend("reference"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(10)
    with repdeg_fast.use_backend("cpu"):
        leave.set()
        thread.join()
        assert backends.requested() == "cpu"
    assert backends.requested() == backends._default


def test_a_compiled_function_follows_the_backend(call, inputs, name):
    asked = []
    kernels = backends.Operation.kernels

    def watching(self, backend, *tensors):
        asked.append(backend)
        return kernels(self, backend, *tensors)

    torch._dynamo.reset()  # all operations are one function to it, which it compiles a few times at most
    compiled = torch.compile(lambda *tensors: _sum(call(*tensors)), backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.Operation, "kernels", watching)
        for backend in ("reference", "cpu", "reference"):
            with repdeg_fast.use_backend(backend):
                compiled(*inputs)
            assert set(asked) == {backend}
            asked.clear()


@pytest.mark.parametrize("operator", [cosreg.cosreg_add_, cosreg.cosreg_backward], ids=["in place", "backward"])
def test_an_overload_takes_changing_numbers_as_tensors(operator):
    x, eps = torch.randn(5, 8), torch.tensor(1e-12, dtype=torch.float64)
    if operator is cosreg.cosreg_add_:
        arguments, varying = (x, 2.0, None, 0.0, "auto"), [None, eps]
        arguments = (torch.zeros(5, 8), *arguments)
    else:
        sums = cosreg.cosreg(x, None, 1e-12, "auto")
        arguments, varying = (torch.ones(()), x, None, *sums[1:3], None, 0.0, "auto"), [eps]
    torch.library.opcheck(operator.varying, (*arguments, varying))


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """With tensors on cuda:1 while cuda:0 is current, a launch would go to the wrong one."""
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    class OnCuda(torch.Tensor):
        device = torch.device("cuda:1")
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "device", Guard)
    body = Operator.__new__(Operator)
    body._body = lambda nothing, x: entered.append("kernel")
    body._run(None, torch.zeros(2).as_subclass(OnCuda))
    assert entered == [torch.device("cuda:1"), "kernel", "left"]


def _sum(result):
    outputs = result if isinstance(result, tuple) else (result,)
    return sum(output.sum() for output in outputs)
