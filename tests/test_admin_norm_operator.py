"""ADMIN's residual block as a PyTorch operator: autograd, compilation, checkpointing, autocast, cost of a fallback."""

import time

import pytest
import torch
from admin_norm_cases import MODES, PARAMETERS, SEED, assert_matches, expected, inputs
from helpers import relative_error
from torch.utils.checkpoint import checkpoint

import repdeg_fast
from repdeg_fast import AdminNorm, admin_norm
from repdeg_fast.ops.admin_norm import admin_norm as operator
from repdeg_fast.reference.admin_norm import eager_form


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, mode):
    norm, dropout, save = mode
    tensors = inputs(3, 5, dtype=torch.float64)

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return admin_norm(**named, norm=norm, dropout=dropout, save=save, seed=SEED)

    with repdeg_fast.use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("save_input", [False, True])
def test_opcheck(save_input):
    tensors = inputs(4, 6)
    seed = torch.tensor([3])
    torch.library.opcheck(operator.overload, (*tensors.values(), seed, 0.2, 1e-5, True, save_input, "auto"))
    none = (None,) * 5
    torch.library.opcheck(
        operator.overload, (tensors["x"], tensors["branch"], *none, 0.0, 1e-5, False, save_input, "auto")
    )


@pytest.mark.parametrize("save", ["auto", "input"])
def test_compiles_as_one_graph(save):
    module = AdminNorm(24, dropout=0.2, save=save)
    x, branch, seed = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 24), torch.tensor([7])
    step = lambda x, seed: module(x.tanh(), branch, seed=seed).sin()  # noqa: E731
    step(x, seed).square().sum().backward()
    eager, x.grad = x.grad, None
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, seed).square().sum().backward()
    assert relative_error(x.grad, eager) <= 1e-6


def test_compiles_with_parameters_made_in_the_graph():
    x, branch, weight = torch.randn(4, 24), torch.randn(4, 24), torch.randn(24, requires_grad=True)
    step = lambda weight: admin_norm(x, branch, weight=2 + weight.tanh())  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(weight).square().sum(), weight)
    (eager,) = torch.autograd.grad(step(weight).square().sum(), weight)
    assert relative_error(gradient, eager) <= 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [None, SEED, torch.tensor([SEED])], ids=["drawn", "int", "tensor"])
def test_checkpointing_replays_the_mask(reentrant, given):
    tensors = inputs(8, 48)

    def block(x, branch):
        return admin_norm(x, branch, tensors["omega"], dropout=0.5, seed=given)

    results = []
    for run in (block, lambda *arguments: checkpoint(block, *arguments, use_reentrant=reentrant)):
        x, branch = (tensors[name].detach().requires_grad_() for name in ("x", "branch"))
        torch.manual_seed(11)
        y = run(x, branch)
        y.square().sum().backward()
        results.append((y, x.grad, branch.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    """Activations go to autocast's dtype, parameters stay; the arithmetic inside is fp32."""
    tensors = inputs(8, 64)
    halved = {**tensors, "branch": tensors["branch"].detach().bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = admin_norm(**halved)
        double = admin_norm(**inputs(2, 8, dtype=torch.float64))
    assert y.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    y.float().square().sum().backward()
    assert tensors["x"].grad.dtype == torch.float32
    assert relative_error(y, expected(tensors, torch.zeros(8, 64))[0]) <= 1e-2


def test_parameters_in_the_dtype_of_the_activations():
    tensors = inputs(8, 64, dtype=torch.bfloat16)
    tensors |= {name: tensors[name].detach().bfloat16().requires_grad_() for name in PARAMETERS}
    assert_matches(tensors)


def test_a_change_in_place_is_a_clear_error_unless_the_input_is_kept():
    tensors = inputs(4, 8)
    options = {"dropout": 0.2, "seed": SEED}

    def gradient(change, save):
        y = admin_norm(**tensors, **options, save=save)
        change(y)
        return torch.autograd.grad(y.sin().sum(), tensors["branch"])[0]

    with pytest.raises(RuntimeError, match=r'admin_norm: y, .*changed in place.* or use save="input".*version 1'):
        gradient(lambda y: y.add_(1), "auto")
    allowed = gradient(lambda y: y.add_(1), "input")
    y = admin_norm(**tensors, **options)
    torch.testing.assert_close(allowed, torch.autograd.grad((y + 1).sin().sum(), tensors["branch"])[0])
    with pytest.raises(RuntimeError, match=r"admin_norm: x, branch or a parameter was changed in place"):
        gradient(lambda y: tensors["weight"].detach().add_(1), "input")


def test_a_graph_is_run_twice_only_where_it_was_asked_for():
    y = admin_norm(**inputs(4, 8)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph a second time"):
        y.backward()


def test_follows_the_backend_of_its_forward_pass():
    tensors = inputs(4, 8, dtype=torch.float64)
    with repdeg_fast.use_backend("reference"):
        y = admin_norm(**tensors)
    with repdeg_fast.use_backend("triton"):  # cannot take float64, and must not be asked
        y.sum().backward()
    assert tensors["x"].grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_reference_costs_little_more_than_eager_pytorch(one_thread, dropout):
    """It is what serves where nothing else does. At most twice, measured with nothing else running."""
    tensors = inputs(4096, 768, absent=("branch_bias",))
    upstream = torch.randn(4096, 768)

    def seconds(function):
        start = time.thread_time()
        torch.autograd.grad(function(**tensors, dropout=dropout), list(tensors.values()), upstream)
        return time.thread_time() - start

    with repdeg_fast.use_backend("reference"):
        eager, ours = (
            min(times) for times in zip(*((seconds(eager_form), seconds(admin_norm)) for _ in range(7)), strict=True)
        )
    assert ours <= 3 * eager
