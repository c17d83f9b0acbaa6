"""Measures over pairs: every backend against the definition in float64."""

import pytest
import torch
from helpers import TOLERANCE, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast import CosineRegularization, cosine_regularization, pairwise_cosine, pairwise_max_cosine
from repdeg_fast.contracts.pairwise import Block, Kind, LeftOut, Rule
from repdeg_fast.functional.pairwise import KINDS
from repdeg_fast.ops import pairwise as ops
from repdeg_fast.ops import pairwise_blocks
from repdeg_fast.reference import pairwise as definition

operation = ops.operation
ONE_SET = [((2, None, 1), False), ((2, None, 5), False), ((3, None, 40), False), ((33, None, 8), False)]
ONE_SET += [((70, None, 17), False)]
TWO_SETS = [(shape, skip) for shape in ((1, 1, 3), (5, 40, 7), (40, 5, 64), (30, 31, 4)) for skip in (False, True)]
SHAPES = [pytest.param(*case, id=f"{case[0]}{' skip' * case[1]}") for case in ONE_SET + TWO_SETS]
OPTIONS = {"margin": 0.0625, "temperature": 0.2}


@pytest.fixture(params=["whole", "cut"])
def chunks(request, monkeypatch):
    """All rows at once, or some at a time."""
    if request.param == "cut":
        cut(monkeypatch)


def cut(monkeypatch):
    monkeypatch.setattr(pairwise_blocks, "ROWS", 9)
    monkeypatch.setattr(pairwise_blocks, "PIECES", 100)
    monkeypatch.setattr(pairwise_blocks, "TILE", 11)
    monkeypatch.setattr(definition, "_CHUNK", 10)


def vectors(n, m, d, dtype=torch.float64, device="cpu"):
    """One or two sets in a cone, with a zero row among three and more."""
    sets = [torch.randn(size, d, dtype=torch.float64) + 0.3 for size in (n, m) if size]
    for one in sets:
        if len(one) > 2:
            one[len(one) // 2] = 0
    return [one.to(dtype).to(device).requires_grad_() for one in sets]


def results(function, sets, upstream=None, **options):
    """The value and the gradients of Σ upstream · value."""
    value = function(*sets, **options)
    upstream = torch.full_like(value, 3) if upstream is None else upstream.to(value)
    gradients = torch.autograd.grad(value, sets, upstream, allow_unused=True)  # unused where no pair is left
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(sets, gradients, strict=True))]


def of_definition(function, sets, upstream=None, **options):
    """The same in double on the CPU."""
    return results(function, [one.detach().cpu().double().requires_grad_() for one in sets], upstream, **options)


def errors(found, expected):
    return [relative_error(one, other) for one, other in zip(found, expected, strict=True)]


def assert_close(found, expected, dtype):
    """Where what is expected is but a rest of terms that cancel, rounding leaves a part of those: of values about 1, of
    gradients 1/‖x‖ times 15 at most (the upstream gradient and 1/T)."""
    for one, other in zip(found, expected, strict=True):
        rest = 0.1 if other.dim() == 0 else 0.1 / len(other) ** 0.5 if other.norm() > 1e-9 else 15
        error = (one.double().cpu() - other.double()).norm().item()
        assert error <= TOLERANCE[dtype] * max(other.norm().item(), rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "skip"), SHAPES)
def test_values_and_gradients(place, chunks, shape, skip, kind):
    options = {"kind": kind, "skip_diagonal": skip, **OPTIONS}
    for dtype in place.dtypes():
        if dtype.itemsize > 2:
            sets = vectors(*shape, dtype, place.device)
            found = results(pairwise_cosine, sets, **options)
            assert [tensor.dtype for tensor in found] == [dtype] * len(found)
            assert_close(found, of_definition(definition.pairwise_cosine, sets, **options), dtype)


@pytest.mark.parametrize(("shape", "skip"), SHAPES)
def test_maxima(place, chunks, shape, skip):
    for dtype in place.dtypes():
        sets = vectors(*shape, dtype, place.device)
        if dtype.itemsize == 2 or shape[2] == 1:  # neighbours by rounded cosines; ties in one dimension
            continue
        upstream = torch.randn(shape[0], dtype=torch.float64)
        found = results(lambda *s: pairwise_max_cosine(*s, skip_diagonal=skip).values, sets, upstream)
        true = of_definition(lambda *s: definition.pairwise_max_cosine(*s, skip_diagonal=skip)[0], sets, upstream)
        assert_close(found, true, dtype)
        index = pairwise_max_cosine(*sets, skip_diagonal=skip).indices.cpu()
        assert torch.equal(index, definition.pairwise_max_cosine(*sets, skip_diagonal=skip)[1].cpu())


@pytest.mark.interpreter
def test_rows_without_padding_stay_apart():
    """What is written beyond a row's last column would be the next one's."""
    from repdeg_fast.triton_kernels import pairwise as kernels

    cosines, sums = torch.rand(3, 17), torch.empty(3)
    given = cosines.clone()
    block = Block(given, torch.ones(3), torch.ones(17), 0, LeftOut.NOTHING)
    kernels.measure(block, Rule(Kind.SQUARE, 0.0, torch.zeros(())), sums, slopes=True)
    assert torch.equal(given, 2 * cosines)
    assert relative_error(sums, cosines.square().sum(1)) <= 1e-6


def test_maxima_in_16_bits(place):
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in place.dtypes():
            (x,) = vectors(90, None, 20, dtype, place.device)
            values, indices = pairwise_max_cosine(x)
            true, _ = definition.pairwise_max_cosine(x.detach().double())
            assert relative_error(values, true) <= 1e-2
            unit = torch.nn.functional.normalize(x.detach().double(), dim=1)
            assert relative_error((unit * unit[indices]).sum(1), values) <= 1e-6  # a row without any has 0 in both


@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_eager_in_16_bits(place, kind):
    """A slope that jumps, jumps where cosines are rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in place.dtypes():
            for shape in ((150, None, 33), (150, 90, 33)):
                sets = vectors(*shape, dtype, place.device)
                expected = of_definition(definition.pairwise_cosine, sets, kind=kind, **OPTIONS)
                other = errors(results(eager, sets, kind=kind, **OPTIONS), expected)
                found = errors(results(pairwise_cosine, sets, kind=kind, **OPTIONS), expected)
                assert all(one <= max(2 * another, 1e-2) for one, another in zip(found, other, strict=True))


def eager(x, y=None, *, kind, margin, temperature):
    """As one would write it, in the dtype of x; but for zero rows."""
    left, right = (torch.nn.functional.normalize(one, dim=1, eps=1e-4) for one in (x, x if y is None else y))
    counted = (left != 0).any(1)[:, None] & (right != 0).any(1)
    if y is None:
        counted &= ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    cosines, pairs = left @ right.T, len(left) * (len(right) - (y is None))
    if kind == "logmeanexp":
        return ((cosines / temperature).exp() * counted).float().sum().div(pairs).log()
    phi = {"mean": cosines, "square": cosines**2, "abs": cosines.abs(), "relu": (cosines - margin).relu()}[kind]
    return (phi * counted).float().sum() / pairs


@pytest.mark.parametrize("temperature", [0.003, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("towards", ["one direction", "two opposite ones"])
def test_log_mean_exp_at_any_temperature(place, chunks, temperature, towards):
    """exp(c/T) overflows from T = 0.011 on, exp((c − 1)/T) vanishes where there is no cosine near 1."""
    x = torch.randn(30, 12, dtype=torch.float64) * 0.05 + 1
    if towards != "one direction":
        x = x[:2] * torch.tensor([[1.0], [-1.0]])
    x = x.float().to(place.device).requires_grad_()
    options = {"kind": "logmeanexp", "temperature": temperature}
    value, gradient = results(pairwise_cosine, [x], **options)
    true, expected = of_definition(definition.pairwise_cosine, [x], **options)
    assert abs(value - true) <= 3e-6 * max(abs(true.item()), 1, 1 / temperature)
    assert relative_error(gradient, expected) <= 1e-5 + 1e-6 / temperature  # of the cosines' rounding


@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "offset"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides(place, view, kind):
    base = vectors(48, None, 48, torch.float32, place.device)[0].detach()
    x = {"transposed": base.T, "columns": base[:, ::3], "rows": base[::2], "offset": base[1:, 1:]}[view]
    y = base.T[: len(x), : x.shape[1]]
    sets = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    assert_close(
        results(pairwise_cosine, sets, kind=kind, **OPTIONS),
        of_definition(definition.pairwise_cosine, sets, kind=kind, **OPTIONS),
        torch.float32,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_change_the_number_of_pairs_alone(place, kind):
    dense = torch.randn(20, 6, device=place.device) + 0.5
    padded = torch.zeros(29, 6, device=place.device)
    padded[2:22] = dense
    options = {"kind": kind, "margin": -0.5, "temperature": 0.3}
    value, gradient = results(pairwise_cosine, [padded.requires_grad_()], **options)
    plain, expected = results(pairwise_cosine, [dense.requires_grad_()], **options)
    share = 20 * 19 / (29 * 28)
    if kind == "logmeanexp":
        assert value.item() == pytest.approx(plain.item() + torch.tensor(share).log().item(), rel=1e-5)
        share = 1
    else:
        assert value.item() == pytest.approx(plain.item() * share, rel=1e-5)
    assert relative_error(gradient[2:22], expected * share) <= 1e-5
    assert not gradient[:2].any()
    assert not gradient[22:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.ones(1, 3)], ids=["zero rows", "one row"])
def test_without_pairs_all_is_zero(place, kind, x):
    value, gradient = results(pairwise_cosine, [x.to(place.device).requires_grad_()], kind=kind)
    assert value.item() == 0
    assert gradient.norm() <= 1e-6
    values, indices = pairwise_max_cosine(x.to(place.device).requires_grad_())
    assert values.tolist() == [0] * len(x)
    assert indices.tolist() == [-1] * len(x)
    assert not torch.autograd.grad(values.sum(), values)[0].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_inf_and_overflow_are_not_masked(place, kind, bad):
    x = vectors(20, None, 6, torch.float32, place.device)[0].detach()
    x[3, 5] = bad
    value, gradient = results(pairwise_cosine, [x.requires_grad_()], kind=kind)
    assert value.isnan()
    assert gradient[3].isnan().any()
    values, indices = pairwise_max_cosine(x)
    assert values[torch.arange(20) != 10].isnan().all()  # all but the zero row
    assert indices[[0, 1]].tolist() == [3, 3]


@pytest.mark.parametrize("size", [1e-24, 1e-10, 1e10])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_count_not_lengths(place, kind, size):
    x = vectors(40, None, 6, torch.float32, place.device)[0].detach()
    x[::3] *= size
    value, gradient = results(pairwise_cosine, [x.requires_grad_()], kind=kind, eps=1e-30)
    true, expected = of_definition(definition.pairwise_cosine, [x], kind=kind, eps=1e-30)
    assert relative_error(value, true) <= 1e-5
    for rows in (slice(0, None, 3), slice(1, None, 3)):
        assert relative_error(gradient[rows] * size, expected[rows] * size) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_shorter_than_eps(place, kind):
    """Where eps is what divides, û = x/eps is linear in x."""
    sets = vectors(12, 9, 4, torch.float32, place.device)
    sets[0].data[2] *= 1e-3 / sets[0].data[2].norm()
    for some in (sets, sets[:1]):
        found = results(pairwise_cosine, some, kind=kind, eps=1e-2, temperature=0.4)
        true = of_definition(definition.pairwise_cosine, some, kind=kind, eps=1e-2, temperature=0.4)
        assert max(errors(found, true)) <= 1e-5


def test_same_bits_twice_and_with_any_number_of_threads(place, threads):
    interpreted = (place.backend, place.device) == ("triton", "cpu")  # slowly
    (x,) = vectors(150 if interpreted else 700, None, 24, torch.float32, place.device)
    found = []
    for number in (1, 1, 2):
        threads(number)
        for kind in KINDS:
            found.append(results(pairwise_cosine, [x], kind=kind, **OPTIONS))
        found.append(results(lambda x: pairwise_max_cosine(x).values, [x]))
    once = len(KINDS) + 1
    for one, other in zip(found[:once], found[once : 2 * once], strict=True):
        assert all(map(torch.equal, one, other))
    for one, other in zip(found[:once], found[2 * once :], strict=True):  # the library's products may round differently
        assert max(errors(one, other)) <= 1e-6


def test_a_mean_is_cosreg_but_for_its_denominator(place):
    (x,) = vectors(30, None, 12, torch.float32, place.device)
    assert relative_error(pairwise_cosine(x, kind="mean") * 29 / 30, cosine_regularization(x)) <= 1e-6


def test_module(place):
    (x,) = vectors(40, None, 12, torch.float32, place.device)
    for kind in ("square", "relu", "logmeanexp"):
        module = CosineRegularization(2.0, kind=kind, margin=0.1, temperature=0.5)
        expected = 2 * pairwise_cosine(x, kind=kind, margin=0.1, temperature=0.5)
        assert torch.equal(module(torch.nn.Embedding.from_pretrained(x)), expected)
        assert f"kind='{kind}'" in repr(module)
    assert torch.equal(CosineRegularization(kind="mean")(x), cosine_regularization(x))
    with pytest.raises(ValueError, match="row_weight: expected None with kind='square'"):
        CosineRegularization(kind="square")(x, torch.ones(40))


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 60), m=st.integers(0, 60), d=st.integers(1, 40), kind=st.sampled_from(KINDS), seed=st.integers(0)
)
def test_any_shape(n, m, d, kind, seed):
    torch.manual_seed(seed % 2**32)
    sets = vectors(n, m, d)
    with repdeg_fast.use_backend("cpu"):
        found = results(pairwise_cosine, sets, kind=kind)
    assert_close(found, of_definition(definition.pairwise_cosine, sets, kind=kind), torch.float64)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    for m in (None, 5):
        sets = vectors(6, m, 4)
        for one in sets:
            one.data[len(one) // 2] = 1  # a kink at a zero row
        with repdeg_fast.use_backend(backend):
            assert torch.autograd.gradcheck(lambda *s: pairwise_cosine(*s, kind=kind, temperature=0.7), sets)
            assert torch.autograd.gradcheck(lambda *s: pairwise_max_cosine(*s).values, sets)
