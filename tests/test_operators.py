"""What all operators have in common: how they are called, what they refuse, and that they leave each other's tensors
alone. An operation is one line in OPERATIONS."""

import threading

import pytest
import torch
from torch.autograd import forward_ad

import repdeg_fast
from repdeg_fast import backends
from repdeg_fast.ops._operator import Operator


def _head(*names):
    shapes = {"hidden_states": (2, 6, 8), "weight": (20, 8), "bias": (20,), "mixture_logits": (6, 2)}
    return [torch.randn(shapes[name], dtype=torch.float64).requires_grad_() for name in names]


HIDDEN = torch.randn(2, 6, 8, dtype=torch.float64)
TARGET = torch.tensor([3, 0, 19, 7, -100, 5])

# name -> (the function of its differentiable inputs, those inputs)
OPERATIONS = {
    "admin_norm": (
        repdeg_fast.admin_norm,
        [torch.randn(shape, dtype=torch.float64) + 2 for shape in ((4, 8), (4, 8), (8,), (8,), (8,))],
    ),
    "contrastive_loss": (repdeg_fast.contrastive_loss, [torch.randn(4, 8, dtype=torch.float64) for _ in range(2)]),
    "cosine_regularization": (repdeg_fast.cosine_regularization, _head("weight")),
    "gumbel_mix": (
        lambda mixture_logits, weight: repdeg_fast.gumbel_mix(HIDDEN, mixture_logits, weight, seed=1)[1],
        _head("mixture_logits", "weight"),
    ),
    "linear_cross_entropy": (
        lambda hidden, weight, bias: repdeg_fast.linear_cross_entropy(hidden[0], weight, TARGET, bias),
        _head("hidden_states", "weight", "bias"),
    ),
    "mlm_losses_and_sample": (
        lambda hidden, weight, bias: repdeg_fast.mlm_losses_and_sample(hidden, None, weight, TARGET, bias, seed=1)[0],
        [tensor[:1] if tensor.dim() == 3 else tensor for tensor in _head("hidden_states", "weight", "bias")],
    ),
    "pairwise_cosine": (
        lambda x, y: repdeg_fast.pairwise_cosine(x, y, kind="abs") + repdeg_fast.pairwise_cosine(x, y, kind="mean"),
        [torch.randn(6, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)],
    ),
    "pairwise_max_cosine": (lambda x: repdeg_fast.pairwise_max_cosine(x)[0], _head("weight")),
}


@pytest.fixture(params=OPERATIONS)
def name(request):
    return request.param


@pytest.fixture
def call(name):
    return OPERATIONS[name][0]


@pytest.fixture
def inputs(name):
    return [tensor.detach().clone().requires_grad_() for tensor in OPERATIONS[name][1]]


def test_forward_mode_is_a_clear_error(name, call, inputs):
    primals = tuple(tensor.detach() for tensor in inputs)
    with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"), forward_ad.dual_level():
        call(*(forward_ad.make_dual(primal, torch.ones_like(primal)) for primal in primals))
    with pytest.raises(RuntimeError, match=f"{name} has no torch.func transform"):
        torch.func.jvp(call, primals, tuple(map(torch.ones_like, primals)))


def test_function_transforms_are_a_clear_error(name, call, inputs):
    with pytest.raises(RuntimeError, match=f"{name} has no torch.func transform"):
        torch.func.grad(lambda *tensors: _sum(call(*tensors)))(*inputs)


def test_vmap_leaves_the_gradient_of_what_it_maps_over(call, inputs):
    """Inside, a tensor does not tell that what it wraps wants a gradient."""
    rows = [torch.stack([tensor.detach(), 2 * tensor.detach()]).requires_grad_() for tensor in inputs]
    mapped = torch.autograd.grad(_sum(torch.func.vmap(call, randomness="different")(*rows)), rows)
    plain = torch.autograd.grad(sum(_sum(call(*one)) for one in zip(*rows, strict=True)), rows)
    for result, expected in zip(mapped, plain, strict=True):
        torch.testing.assert_close(result, expected)


MODULES = {
    "admin_norm": (repdeg_fast.AdminNorm(8), (HIDDEN[0].float(), HIDDEN[1].float())),
    "cosine_regularization": (repdeg_fast.CosineRegularization(), (HIDDEN[0].float(),)),
    "gumbel_mix": (repdeg_fast.GumbelMixture(8), (HIDDEN.float(), HIDDEN.float(), torch.randn(20, 8))),
    "linear_cross_entropy": (
        repdeg_fast.MultiLayerMLMHead(8, torch.nn.Embedding(20, 8)),
        (HIDDEN.float(), TARGET),
    ),
}


@pytest.mark.parametrize("named", MODULES)
def test_function_transforms_of_modules_are_a_clear_error(named):
    module, arguments = MODULES[named]

    def value(first):
        result = module(first, *arguments[1:])
        return _sum(result[1] if isinstance(result, tuple) else result)

    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), randomness="different")):
        first = arguments[0] if transform is torch.func.grad else arguments[0].expand(2, *arguments[0].shape)
        with pytest.raises(RuntimeError, match=f"{named} has no torch.func transform"):
            transform(value)(first)


def test_gradient_reversal_takes_function_transforms():
    x = torch.randn(3, 4)
    gradient = torch.func.vmap(torch.func.grad(lambda row: repdeg_fast.gradient_reversal(row.sin(), -2.0).sum()))(x)
    torch.testing.assert_close(gradient, -2 * x.cos())


def test_second_derivatives_are_a_clear_error(call, inputs):
    gradients = torch.autograd.grad(_sum(call(*inputs)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^\w+ has no second derivative"):
        sum(gradient.sum() for gradient in gradients).backward()


def test_same_through_the_dispatcher(call, inputs):
    """What compilers and modes see is what a plain call computes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looking(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, str(func))
            return func(*args, **(kwargs or {}))

    plain = torch.autograd.grad(_sum(call(*inputs)), inputs)
    with Looking() as mode:
        seen = torch.autograd.grad(_sum(call(*inputs)), inputs)
    assert any(operator.startswith("repdeg_fast.") for operator in mode.seen)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


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
    return result.sum()
