"""ADMIN's residual block: every backend against the definition in float64."""

import pytest
import torch
from admin_norm_cases import MODES, PARAMETERS, SEED, actual, assert_matches, expected, inputs, keep_of
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast import admin_norm
from repdeg_fast.ops.admin_norm import operation
from repdeg_fast.reference import admin_norm as definition

SHAPES = [(1, 1), (4, 2), (5, 7), (13, 96), (2, 3, 768)]
LONG_ROWS = [2056, 4360, 8712]  # each takes another way on some backend: more values a thread, or rows read twice


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(place, shape, mode):
    norm, dropout, save = mode
    for dtype in place.dtypes():
        tensors = inputs(*shape, dtype=dtype, device=place.device)
        place.skip_unless_served(operation, tensors["x"].detach().reshape(-1, shape[-1]))
        assert_matches(tensors, norm, dropout, save=save)


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
@pytest.mark.parametrize("d", LONG_ROWS)
def test_long_rows(place, d, mode):
    norm, dropout, save = mode
    for dtype in place.dtypes()[: 1 if place.backend == "triton" else None]:  # the interpreter is slow
        assert_matches(inputs(2, d, dtype=dtype, device=place.device), norm, dropout, save=save)


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
@pytest.mark.parametrize(("n", "d"), [(200, 96), (80, 264), (40, 1032), (30, 4360)])
def test_rings_of_rows(emulated_cuda, monkeypatch, capability, n, d, mode):
    """Bulk copies, and those that chips before 9.0 have; more rows than a block's rings hold, or rows in parts. A
    thread has more of a row where no branch bias takes registers."""
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", capability)
    norm, dropout, save = mode
    with repdeg_fast.use_backend("cuda-emulated"):
        for absent in (), ("omega", "branch_bias"):
            assert_matches(inputs(n, d, absent=absent), norm, dropout, save=save)


@pytest.mark.parametrize("absent", [PARAMETERS, ("omega",), ("weight",), ("bias",), ("branch_bias",)], ids=str)
@pytest.mark.parametrize("save", ["output", "input"])
def test_absent_parameters(place, absent, save):
    tensors = inputs(9, 64, device=place.device, absent=absent)
    assert_matches(tensors, save=save)
    assert_matches(tensors, "rms", 0.2, save=save)


@pytest.mark.parametrize("kind", ["number", "0-d", "1-d"])
def test_one_omega_for_all_columns(place, kind):
    tensors = inputs(9, 64, device=place.device, absent=("omega",))
    shape = (1,) if kind == "1-d" else ()
    spread = dict(tensors, omega=torch.full((64,), 0.75, device=place.device, requires_grad=True))
    upstream = torch.randn(9, 64, device=place.device)
    true_y, true_gradients = expected(spread, upstream)
    if kind == "number":
        assert relative_error(admin_norm(**tensors, omega=0.75), true_y) <= 1e-5
        return
    tensors["omega"] = torch.full(shape, 0.75, device=place.device, requires_grad=True)
    y, gradients = actual(tensors, upstream)
    assert relative_error(y, true_y) <= 1e-5
    assert relative_error(gradients["omega"], true_gradients["omega"].sum().reshape(shape)) <= 1e-5


@pytest.mark.parametrize("view", ["rows apart", "values apart", "batch last", "expanded upstream"])
def test_strides(place, view):
    base = torch.randn(2, 8, 12, 192, device=place.device)
    x, branch = {
        "rows apart": (base[0, ..., :96], base[1, ..., 96:]),
        "values apart": (base[0, ..., ::2], base[1].transpose(0, 2)[:96].permute(2, 1, 0)),
        "batch last": (base[0].transpose(0, 1), base[1].transpose(0, 1)),
        "expanded upstream": (base[0], base[1]),
    }[view]
    tensors = inputs(*x.shape, device=place.device) | {"x": x.requires_grad_(), "branch": branch.requires_grad_()}
    upstream = torch.randn(x.shape, device=place.device)
    upstream = upstream[..., :1].expand(x.shape) if view == "expanded upstream" else upstream
    true_y, true_gradients = expected(tensors, upstream)
    y, gradients = actual(tensors, upstream)
    assert relative_error(y, true_y) <= 1e-5
    assert max(relative_error(gradients[name], true_gradients[name]) for name in tensors) <= 1e-5


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
@pytest.mark.parametrize("d", [96, LONG_ROWS[-1]])
def test_rows_of_x_and_branch_lie_apart_by_different_strides(place, d, mode):
    norm, dropout, save = mode
    tensors = inputs(3, d, device=place.device)
    for name, stride in (("x", 2 * d), ("branch", 3 * d)):
        wide = tensors[name].new_zeros(3, stride)
        wide[:, :d] = tensors[name].detach()
        tensors[name] = wide[:, :d].requires_grad_()
    assert_matches(tensors, norm, dropout, save=save)


def test_more_blocks_than_one_step_of_the_reduction(place):
    """The sums over rows of 100 rows, which many blocks share."""
    assert_matches(inputs(100, 64, device=place.device))


def test_parameters_that_are_views_into_a_flat_buffer(place):
    tensors = inputs(6, 64, device=place.device)
    flat = torch.rand(4 * 64 + 1, device=place.device) + 0.5
    views = flat[1:].view(4, 64)
    assert_matches(
        tensors | {name: view.detach().requires_grad_() for name, view in zip(PARAMETERS, views, strict=True)}
    )


def test_the_mask_is_philox(place):
    """The branch's gradient is zero exactly where the reference's mask drops, beyond the first rows and columns too."""
    tensors = inputs(70, 104, device=place.device)
    for seed in (SEED, -SEED, torch.tensor([SEED], device=place.device)):
        number = seed.item() if isinstance(seed, torch.Tensor) else seed
        _, gradients = actual(tensors, torch.randn(70, 104, device=place.device), dropout=0.4, seed=seed)
        dropped = keep_of((70, 104), 0.4, number) == 0
        assert torch.equal(gradients["branch"].cpu() == 0, dropped)


def test_dropout_off(place):
    tensors = inputs(6, 32, device=place.device)
    y = admin_norm(**tensors)
    assert torch.equal(admin_norm(**tensors, dropout=0.5, training=False, seed=1), y)
    assert not torch.equal(admin_norm(**tensors, dropout=0.5, seed=1), y)


def test_seeds_drawn_from_torchs_generator():
    tensors = inputs(6, 32)
    torch.manual_seed(3)
    first, second = (admin_norm(**tensors, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(admin_norm(**tensors, dropout=0.5), first)
    assert not torch.equal(first, second)


def test_same_bits_twice(place):
    tensors = inputs(130, 96, device=place.device)
    upstream = torch.randn(130, 96, device=place.device)
    for save in ("output", "input"):
        (y, gradients), (again, gradients_again) = (
            actual(tensors, upstream, dropout=0.1, seed=5, save=save) for _ in range(2)
        )
        assert torch.equal(y, again)
        assert all(torch.equal(gradients[name], gradients_again[name]) for name in tensors)


def test_bits_do_not_depend_on_threads(threads):
    tensors, upstream = inputs(3000, 65), torch.randn(3000, 65)
    results = []
    for number in (1, 2, 3):
        threads(number)
        with repdeg_fast.use_backend("cpu"):
            y, gradients = actual(tensors, upstream, dropout=0.1, seed=5)
        results.append([y, *gradients.values()])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_no_rows(place):
    tensors = inputs(0, 64, device=place.device)
    y, gradients = actual(tensors, torch.zeros(0, 64, device=place.device), dropout=0.1)
    assert y.shape == (0, 64)
    assert gradients["x"].shape == (0, 64)
    assert not any(gradients[name].any() for name in PARAMETERS)


@settings(max_examples=25, deadline=None)
@given(
    leading=st.lists(st.integers(1, 6), max_size=3),
    d=st.integers(3, 70),
    mode=st.sampled_from(MODES),
    absent=st.sets(st.sampled_from(PARAMETERS)),
    seed=st.integers(0, 2**16),
)
def test_any_shape(leading, d, mode, absent, seed):
    torch.manual_seed(seed)
    norm, dropout, save = mode
    with repdeg_fast.use_backend("cpu"):
        assert_matches(inputs(*leading, d, dtype=torch.float64, absent=absent), norm, dropout, save=save)


@pytest.mark.gpu
def test_cuda_graph_replays_with_another_seed(place):
    tensors = inputs(300, 256, dtype=torch.bfloat16, device=place.device)
    seed, upstream = torch.tensor([1], device="cuda"), torch.randn(300, 256, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual(tensors, upstream, dropout=0.1, seed=seed)  # compiles and looks at the parameters
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = actual(tensors, upstream, dropout=0.1, seed=seed)
    seed.fill_(SEED)
    graph.replay()
    true_y, true_gradients = expected(tensors, upstream, dropout=0.1)
    assert relative_error(y, true_y) <= 1e-2
    assert all(relative_error(gradients[name], true_gradients[name]) <= 1e-2 for name in tensors)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_two_to_the_31_elements(place):
    n, d = 2**19 + 3, 4096
    x = torch.zeros(n, d, device="cuda", dtype=torch.bfloat16)
    x[-1, 0] = 1
    y = admin_norm(x, x)
    true_y = definition.admin_norm(x[-1:].double(), x[-1:].double())
    assert relative_error(y[-1:], true_y) <= 1e-2
    assert not y[:-1].any()
