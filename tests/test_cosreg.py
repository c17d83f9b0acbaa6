"""CosReg: every backend against the definition in float64."""

import pytest
import torch
from helpers import TOLERANCE, relative_error, saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import repdeg_fast
from repdeg_fast import CosineRegularization, add_cosine_regularization_, cosine_regularization
from repdeg_fast.ops.cosreg import cosreg, cosreg_add_, operation
from repdeg_fast.reference import cosreg as definition

SHAPES = [(1, 1), (2, 1), (1, 7), (3, 5), (1, 8), (65, 127), (129, 768), (300, 40), (5, 1024), (31, 2304)]
SHAPES += [(9, 8192), (3, 12288)]


def embedding(n, d, dtype=torch.float64, device="cpu", shift=0.3):
    """Vectors of a degenerate cone (a common shift), so that R is well away from zero, with a zero row."""
    weight = torch.randn(n, d, dtype=torch.float64) + shift
    if n > 2:
        weight[n // 2] = 0
    return weight.to(dtype).to(device)


def expected(weight, row_weight=None, eps=1e-12):
    """R and its gradient from the definition, in float64 on the CPU."""
    weight = weight.detach().cpu().double().requires_grad_()
    p = None if row_weight is None else row_weight.detach().cpu().double()
    value = definition.cosine_regularization(weight, p, eps)
    value.backward()
    return value.detach(), weight.grad


def assert_matches(value, grad, weight, row_weight=None, eps=1e-12):
    """R is a difference; where it cancels, its error is measured against its second term, about 1/N."""
    true_value, true_grad = expected(weight, row_weight, eps)
    scale = max(abs(true_value.item()), 1 / len(weight))
    assert abs(value.item() - true_value.item()) <= TOLERANCE[weight.dtype] * scale
    if min(weight.shape) > 1:
        assert relative_error(grad, true_grad) <= TOLERANCE[weight.dtype]
    else:  # one row or one column: the gradient is zero, and rounding leaves a part of its terms 2/(N ‖w‖)
        norm = weight.detach().double().norm(dim=1)
        assert grad.norm().item() <= TOLERANCE[weight.dtype] * 2 / len(weight) / norm[norm > 0].min().item()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(place, shape, weighted):
    for dtype in place.dtypes():
        weight = embedding(*shape, dtype, place.device).requires_grad_()
        place.skip_unless_served(operation, weight)
        row_weight = torch.rand(shape[0], device=place.device) + 0.1 if weighted else None
        value = cosine_regularization(weight, row_weight=row_weight)
        value.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert weight.grad.dtype == dtype
        assert_matches(value, weight.grad, weight, row_weight)


def test_upstream_gradient_scales(place):
    weight = embedding(40, 24, torch.float32, place.device).requires_grad_()
    (-3.5 * cosine_regularization(weight)).backward()
    assert relative_error(weight.grad, -3.5 * expected(weight)[1]) <= 1e-5


@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "offset", "a start off 16 bytes"])
def test_strides(place, view):
    base = embedding(96, 96, torch.float32, place.device)
    weight = {
        "a start off 16 bytes": base[:, 1:65],
        "transposed": base.T,
        "columns": base[:, ::3],
        "rows": base[::2],
        "offset": base[1:, 1:],
    }[view].detach()
    place.skip_unless_served(operation, weight)
    leaf = weight.requires_grad_()
    value = cosine_regularization(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    assert_matches(value, grad, weight.contiguous())


def test_zero_rows_contribute_nothing_and_get_no_gradient(place):
    weight = torch.zeros(6, 8, device=place.device)
    weight[1], weight[4] = 1.0, 2.0
    weight.requires_grad_()
    value = cosine_regularization(weight)
    value.backward()
    assert value.item() == pytest.approx(2 / 36, rel=1e-6)
    assert not weight.grad[[0, 2, 3, 5]].any()


def test_all_rows_zero(place):
    weight = torch.zeros(5, 4, device=place.device, requires_grad=True)
    value = cosine_regularization(weight)
    value.backward()
    assert value.item() == 0
    assert not weight.grad.any()


def test_one_row_is_zero(place):
    weight = torch.randn(1, 32, device=place.device, requires_grad=True)
    value = cosine_regularization(weight)
    value.backward()
    assert abs(value.item()) <= 1e-6
    assert weight.grad.norm().item() <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nan_inf_and_overflow_are_not_masked(place, bad):
    weight = embedding(20, 16, torch.float32, place.device)
    weight[3, 5] = bad
    weight.requires_grad_()
    value = cosine_regularization(weight)
    value.backward()
    assert value.isnan()
    assert weight.grad[3].isnan().any()


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_shorter_than_eps(place, weighted):
    """Where eps is what divides, ŵ = w/eps is linear in w."""
    weight = embedding(12, 16, torch.float32, place.device)
    weight[2] *= 1e-3 / weight[2].norm()
    weight.requires_grad_()
    row_weight = torch.rand(12, device=place.device) + 0.5 if weighted else None
    value = cosine_regularization(weight, row_weight=row_weight, eps=1e-2)
    value.backward()
    true_value, true_grad = expected(weight, row_weight, eps=1e-2)
    assert relative_error(value, true_value) <= 1e-5
    for rows in (slice(2, 3), slice(3, None)):  # the short one's gradient is of another size
        assert relative_error(weight.grad[rows], true_grad[rows]) <= 1e-5


@pytest.mark.parametrize("size", [1e-24, 1e-17, 1e-10, 1e10])
def test_rows_whose_squares_leave_the_range_of_fp32(place, size):
    """Directions count, not lengths: a row of 1e-24 is not a zero row."""
    weight = embedding(40, 24, torch.float32, place.device)
    weight[::3] *= size
    weight.requires_grad_()
    value = cosine_regularization(weight, eps=1e-30)
    value.backward()
    true_value, true_grad = expected(weight, eps=1e-30)
    assert abs(value.item() - true_value.item()) <= 1e-5
    for rows in (slice(0, None, 3), slice(1, None, 3)):  # one norm of both would show the larger gradients only
        assert relative_error(weight.grad[rows] * size, true_grad[rows] * size) <= 1e-5


@pytest.mark.parametrize("total", [5e-20, 1e-30, 1e19, 1e24, 1e37])
def test_the_sum_of_row_weights_does_not_matter(place, total):
    weight = embedding(12, 8, torch.float32, place.device).requires_grad_()
    p = torch.rand(12, device=place.device) + 0.5
    value = cosine_regularization(weight, row_weight=p * (total / p.sum()))
    value.backward()
    assert_matches(value, weight.grad, weight, p)


def test_same_bits_twice(place):
    weight = embedding(500, 96, torch.float32, place.device).requires_grad_()
    first = torch.autograd.grad(cosine_regularization(weight), weight)[0]
    assert torch.equal(cosine_regularization(weight), cosine_regularization(weight))
    assert torch.equal(first, torch.autograd.grad(cosine_regularization(weight), weight)[0])


def test_bits_do_not_depend_on_threads(threads):
    weight = embedding(5000, 65, torch.float32).requires_grad_()
    results = []
    for number in (1, 2, 3):
        threads(number)
        with repdeg_fast.use_backend("cpu"):
            value = cosine_regularization(weight)
            results.append((value, torch.autograd.grad(value, weight)[0]))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_add_to_gradient(place, weighted):
    for dtype in place.dtypes():
        weight = embedding(70, 48, dtype, place.device).requires_grad_()
        row_weight = torch.rand(70, device=place.device) if weighted else None
        weight.grad = start = torch.zeros_like(weight)
        value = add_cosine_regularization_(weight, 0.25, row_weight=row_weight)
        assert weight.grad is start
        true_value, true_grad = expected(weight, row_weight)
        assert relative_error(value, true_value) <= TOLERANCE[dtype]
        assert relative_error(weight.grad, 0.25 * true_grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("n", "d"), [(300, 96), (300, 264), (150, 2304), (40, 3080), (4, 12288)])
def test_rings_of_rows(emulated_cuda, monkeypatch, capability, n, d):
    """Bulk copies, and those that older chips have; more rows than a block's rings hold, or less room for these."""
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", capability)
    weight = embedding(n, d, torch.float32).requires_grad_()
    start = 1e-3 * torch.randn(n, d)
    weight.grad = start.clone()
    with repdeg_fast.use_backend("cuda-emulated"):
        value = add_cosine_regularization_(weight, 0.25)
    true_value, true_grad = expected(weight)
    assert relative_error(value, true_value) <= TOLERANCE[torch.float32]
    assert relative_error(weight.grad, start + 0.25 * true_grad) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("layout", ["odd", "transposed", "padded"])
def test_add_to_a_gradient_of_another_layout(place, layout):
    d = 47 if layout == "odd" else 48
    weight = embedding(32, d, torch.float32, place.device).requires_grad_()
    start = (1e-3 * torch.randn(32, 64, device=place.device))[:, :d]
    if layout == "transposed":
        start = start.t().contiguous().t()
    weight.grad = start if layout == "padded" else start.clone()
    assert weight.grad.is_contiguous() == (layout == "odd")
    place.skip_unless_served(operation, weight, weight.grad)
    expected_grad = start.double().cpu() + expected(weight)[1]
    add_cosine_regularization_(weight, 1.0)
    assert relative_error(weight.grad, expected_grad) <= 1e-5


def test_more_programs_than_one_step_of_the_reduction(place, monkeypatch):
    if place.backend == "triton" and place.device == "cpu":
        from repdeg_fast.triton_kernels import cosreg as kernels

        monkeypatch.setattr(kernels, "persistent_programs", lambda tensor, _: 100)
    weight = embedding(200, 2048, torch.float32, place.device).requires_grad_()
    value = cosine_regularization(weight)
    value.backward()
    assert_matches(value, weight.grad, weight)


def test_many_rows_of_one_direction():
    """Where rows add up without cancelling, a long fp32 sum would be off by more than the tolerance."""
    weight = (torch.randn(4, dtype=torch.float64) + torch.randn(300_000, 4, dtype=torch.float64) * 1e-3).float()
    for backend in ("reference", "cpu"):
        with repdeg_fast.use_backend(backend):
            value = cosine_regularization(weight)
        assert relative_error(value, definition.closed_form(weight.double())) <= 1e-5


def test_add_accumulates_and_makes_a_missing_gradient(place):
    weight = embedding(30, 16, torch.float32, place.device).requires_grad_()
    add_cosine_regularization_(weight, 100.0)
    once = weight.grad.clone()
    add_cosine_regularization_(weight, 100.0)
    assert relative_error(weight.grad, 2 * once) <= 1e-6
    assert relative_error(once, 100 * expected(weight)[1]) <= 1e-5


def test_add_equals_training_with_the_term(place):
    one, two = (embedding(50, 16, torch.float32, place.device).requires_grad_() for _ in range(2))
    two.data.copy_(one.data)
    (one.square().sum() + 3 * cosine_regularization(one)).backward()
    two.square().sum().backward()
    add_cosine_regularization_(two, 3.0)
    assert relative_error(two.grad, one.grad) <= 1e-6


def test_module(place):
    weight = embedding(20, 8, torch.float32, place.device)
    regularizer = CosineRegularization(coefficient=2.0)
    value = 2 * cosine_regularization(weight)
    assert torch.equal(regularizer(weight), value)
    assert torch.equal(regularizer(nn.Embedding.from_pretrained(weight)), value)
    linear = nn.Linear(8, 20, bias=False, device=place.device)
    linear.weight.data.copy_(weight)
    assert torch.equal(regularizer(linear), value)
    assert "coefficient=2.0" in repr(regularizer)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), d=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_any_shape(n, d, seed):
    torch.manual_seed(seed)
    weight = embedding(n, d, torch.float32).requires_grad_()
    with repdeg_fast.use_backend("cpu"):
        value = cosine_regularization(weight)
        value.backward()
    assert_matches(value, weight.grad, weight)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    weight = embedding(6, 5).requires_grad_()
    weight.data[3] = torch.randn(5, dtype=torch.float64)  # R has a kink at a zero row
    row_weight = torch.rand(6, dtype=torch.float64)
    with repdeg_fast.use_backend(backend):
        assert torch.autograd.gradcheck(cosine_regularization, (weight,))
        assert torch.autograd.gradcheck(lambda w: cosine_regularization(w, row_weight=row_weight), (weight,))


def test_opcheck():
    weight = embedding(6, 5).requires_grad_()
    row_weight = torch.rand(6, dtype=torch.float64)
    for p in (None, row_weight):
        torch.library.opcheck(cosreg.overload, (weight, p, 1e-12, "auto"))
        grad = torch.zeros(6, 5, dtype=torch.float64)
        torch.library.opcheck(cosreg_add_.overload, (grad, weight.detach(), 0.5, p, 1e-12, "auto"))


def test_saves_one_value_a_row_and_a_column():
    weight = embedding(700, 96, torch.float32).requires_grad_()
    assert 0 < saved_bytes(lambda: cosine_regularization(weight), weight) <= 4 * (700 + 96)


def test_follows_the_backend_of_its_forward_pass():
    weight = embedding(30, 8).requires_grad_()
    with repdeg_fast.use_backend("reference"):
        value = cosine_regularization(weight)
    with repdeg_fast.use_backend("triton"):  # cannot take float64, and must not be asked
        value.backward()
    assert weight.grad is not None


def good():
    return torch.randn(4, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cosine_regularization([[1.0]]), TypeError, "weight: expected a tensor, got list"),
        (lambda: cosine_regularization(torch.randn(3)), ValueError, "weight: expected 2 dimensions"),
        (lambda: cosine_regularization(torch.randn(0, 3)), ValueError, "weight: expected at least one row"),
        (lambda: cosine_regularization(torch.randn(3, 0)), ValueError, "weight: expected at least one row"),
        (lambda: cosine_regularization(torch.ones(3, 3, dtype=torch.int64)), TypeError, "weight: .*torch.int64"),
        (lambda: cosine_regularization(torch.eye(3).to_sparse()), ValueError, "weight: expected a dense tensor"),
        (lambda: cosine_regularization(good(), eps=0), ValueError, "eps: .*got 0"),
        (lambda: cosine_regularization(good(), eps=float("nan")), ValueError, "eps: "),
        (lambda: cosine_regularization(good(), eps=None), TypeError, "eps: expected a number, got NoneType"),
        (lambda: CosineRegularization("1"), TypeError, "coefficient: expected a number, got str"),
        (lambda: add_cosine_regularization_(good(), float("nan")), ValueError, "coefficient: .*finite"),
        (lambda: add_cosine_regularization_(good() * 2, 1.0), ValueError, "weight: expected a parameter"),
        (lambda: add_cosine_regularization_(good().detach(), 1.0), ValueError, "weight: is frozen"),
        (lambda: cosine_regularization(good(), row_weight=torch.ones(3)), ValueError, r"row_weight: .*\(4,\).*\(3,\)"),
        (lambda: cosine_regularization(good(), row_weight=torch.ones(4, 1)), ValueError, "row_weight: expected shape"),
        (lambda: cosine_regularization(good(), row_weight=torch.ones(4).int()), TypeError, "row_weight: "),
        (lambda: cosine_regularization(good(), row_weight=-torch.ones(4)), ValueError, "row_weight: .*negative"),
        (lambda: cosine_regularization(good(), row_weight=torch.zeros(4)), ValueError, "row_weight: .*positive sum"),
        (
            lambda: cosine_regularization(good(), row_weight=torch.ones(4, requires_grad=True)),
            ValueError,
            r"row_weight: .*detach\(\)",
        ),
        (
            lambda: cosine_regularization(good(), row_weight=torch.ones(4, device="meta")),
            ValueError,
            "row_weight: .*meta",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_gradient():
    weight = good()
    weight.grad = torch.zeros(4, 3).to_sparse()
    with pytest.raises(ValueError, match=r"weight.grad: .*sparse=False"):
        add_cosine_regularization_(weight, 1.0)
    weight.grad = torch.zeros(3).expand(4, 3)
    with pytest.raises(ValueError, match=r"weight.grad: .*clone"):
        add_cosine_regularization_(weight, 1.0)
    half = torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True)
    half.grad = torch.zeros(4, 3, dtype=torch.bfloat16)
    half.data = half.data.float()
    with pytest.raises(TypeError, match=r"weight.grad: expected torch.float32 .*torch.bfloat16"):
        add_cosine_regularization_(half, 1.0)


@pytest.mark.gpu
def test_bad_row_weight_is_nan_on_a_gpu():
    weight = torch.randn(4, 3, device="cuda")
    assert cosine_regularization(weight, row_weight=torch.tensor([1.0, -1, 1, 1], device="cuda")).isnan()
    assert cosine_regularization(weight, row_weight=torch.zeros(4, device="cuda")).isnan()


@pytest.mark.gpu
def test_cuda_graph_replays(place):
    weight = embedding(300, 256, torch.float32, place.device).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    add_cosine_regularization_(weight, 1.0)  # compiles and warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = add_cosine_regularization_(weight, 1.0)
    weight.data.mul_(torch.rand(300, 1, device="cuda") + 0.5).add_(0.1)
    weight.grad.zero_()
    graph.replay()
    true_value, true_grad = expected(weight)
    assert relative_error(value, true_value) <= 1e-5
    assert relative_error(weight.grad, true_grad) <= 1e-5


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_two_to_the_31_elements(place):
    n, d = 2**21 + 3, 1024
    weight = torch.ones(n, d, device="cuda", dtype=torch.bfloat16)
    weight[-1] = -1
    value = cosine_regularization(weight)
    assert value.item() == pytest.approx(((n - 2) ** 2 - n) / n**2, rel=1e-5)
