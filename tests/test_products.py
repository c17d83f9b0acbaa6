"""Who makes large matrix products, how that is settled, and the linear layers that are made of them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from torch import nn
from torch.nn import functional as F

from repdeg_fast.backends import use_backend
from repdeg_fast.native import build, products
from repdeg_fast.nn.admin.attention import project
from repdeg_fast.ops.linear import linear, native_linear

WAYS = tuple(products.WAYS)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process, with an empty cache folder."""
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(products.VARIABLE, raising=False)
    products.forget()
    yield monkeypatch
    products.forget()


@pytest.fixture
def native():
    if reason := build.unavailable("cpu"):
        pytest.skip(reason)
    build.load("cpu")
    return torch.ops.repdeg_fast_native


@pytest.fixture(params=WAYS)
def way(request, native, fresh):
    fresh.setenv(products.VARIABLE, request.param)
    try:
        assert products.settle(native) == request.param
    except RuntimeError as error:  # batch-invariant, with another version of oneDNN
        pytest.skip(str(error))
    return request.param


class Fake:
    """Native operators whose products take as long as they are told to, by a clock of their own."""

    def __init__(self, monkeypatch, seconds, has_onednn=True):
        self.seconds, self.has_onednn, self.now, self.used, self.rounds = seconds, has_onednn, 0.0, None, 0
        self.use_products = SimpleNamespace(default=self._use)
        self.linear_cross_entropy_multiply = SimpleNamespace(default=self._multiply)
        monkeypatch.setattr(products, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def _use(self, *arguments):
        self.used = arguments
        return self.has_onednn or not arguments[1]

    def _multiply(self, out, a, b, accumulate):
        self.rounds += 1
        self.now += self.seconds[next(way for way, arguments in products.WAYS.items() if arguments == self.used)]


@pytest.mark.parametrize("best", products.MEASURED)
def test_the_fastest_is_taken_and_kept(fresh, best):
    fake = Fake(fresh, {way: 0.001 if way == best else 0.002 for way in WAYS})
    assert products.settle(fake) == best
    assert fake.used == products.WAYS[best]
    assert fake.now < 0.3
    products.forget()
    rounds = fake.rounds
    assert products.settle(fake) == best
    assert fake.rounds == rounds  # read, not measured


def test_pytorchs_own_stays_where_nothing_is_clearly_faster(fresh):
    assert products.settle(Fake(fresh, {"library": 0.01, "pieces": 0.0099, "onednn": 0.0098})) == "library"


def test_each_number_of_threads_is_measured(fresh, threads):
    threads(1)
    assert products.settle(Fake(fresh, {"library": 2, "pieces": 3, "onednn": 1})) == "onednn"
    threads(2)
    assert products.settle(Fake(fresh, {"library": 2, "pieces": 1, "onednn": 3})) == "pieces"
    threads(1)
    fake = Fake(fresh, {})
    assert products.settle(fake) == "onednn"
    assert fake.used == products.WAYS["onednn"]


def test_what_another_machine_kept_is_not_taken(fresh):
    products.settle(Fake(fresh, {"library": 2, "pieces": 3, "onednn": 1}))
    products.forget()
    fresh.setattr(build, "processor", lambda: "another")
    assert products.settle(Fake(fresh, {"library": 1, "pieces": 3, "onednn": 2})) == "library"


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"x": 1}'])
def test_a_file_of_garbage_is_measured_over(fresh, garbage):
    products.file().write_text(garbage)
    assert products.settle(Fake(fresh, {"library": 2, "pieces": 1, "onednn": 3})) == "pieces"
    products.forget()
    assert products.settle(Fake(fresh, {})) == "pieces"


def test_without_onednn(fresh):
    fresh.setenv(products.VARIABLE, "onednn")
    fake = Fake(fresh, {}, has_onednn=False)
    assert products.settle(fake) == "pieces"
    fresh.setenv(products.VARIABLE, products.BATCH_INVARIANT)
    products.forget()
    with pytest.raises(RuntimeError, match="REPDEG_FAST_PRODUCTS=batch-invariant needs oneDNN"):
        products.settle(fake)


def test_batch_invariance_that_onednn_does_not_keep(fresh):
    fresh.setenv(products.VARIABLE, products.BATCH_INVARIANT)
    fake = Fake(fresh, {})
    fake.linear_cross_entropy_multiply.default = lambda out, a, b, accumulate: out.fill_(len(a))
    with pytest.raises(RuntimeError, match="oneDNN gives a row other bits in another batch"):
        products.settle(fake)


def test_an_unknown_way(fresh):
    fresh.setenv(products.VARIABLE, "mkl")
    with pytest.raises(
        ValueError, match="REPDEG_FAST_PRODUCTS: expected one of library, pieces, onednn, batch-invariant, got 'mkl'"
    ):
        products.settle(Fake(fresh, {}))


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 5, 7), (33, 40, 2100), (2100, 40, 33), (33, 2100, 40), (1, 1300, 1)])
def test_every_way_multiplies(way, native, dtype, accumulate, m, k, n):
    """Operands as they lie, transposed and as slices; the same bits twice."""
    if way == products.BATCH_INVARIANT and dtype != torch.float32:
        with pytest.raises(RuntimeError, match=r"batch-invariant products \(REPDEG_FAST_PRODUCTS\) are of float32"):
            native.linear_cross_entropy_multiply.default(*(torch.zeros(4, 4, dtype=dtype) for _ in range(3)), False)
        return
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    matrices = (
        (random(m, k), random(k, n)),
        (random(k, m).t(), random(n, k).t()),
        (random(m, k + 8)[:, 4:-4], random(k, n + 8)[:, :n]),
    )
    for a, b in matrices:
        before = random(m, n + 3)[:, :n]
        out, again = before.clone(), before.clone()
        for target in (out, again):
            native.linear_cross_entropy_multiply.default(target, a, b, accumulate)
        expected = a.double() @ b.double() + (before.double() if accumulate else 0)
        assert relative_error(out, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert torch.equal(out, again)


@pytest.mark.cpp
@pytest.mark.parametrize(("m", "k", "n"), [(33, 40, 2100), (2100, 40, 33), (33, 2100, 40)])
def test_three_threads_share_a_product(m, k, n, threads, way, native):
    """Pieces of one operand, the last of them shorter, or sums of each thread's own; in order, so that bits stay."""
    threads(3)
    a, b = torch.randn(m, k), torch.randn(k, n)
    outs = [torch.randn(m, n) for _ in range(2)]
    for out in outs:
        native.linear_cross_entropy_multiply.default(out, a, b, False)
    assert relative_error(outs[0], a.double() @ b.double()) < 1e-6
    assert torch.equal(*outs)


@pytest.mark.cpp
def test_a_bias_of_any_stride(way, native):
    x, weight, bias = torch.randn(1500, 8), torch.randn(12, 8), torch.randn(24)[::2]
    made = native.product.default(x, weight.t(), bias)
    assert relative_error(made, x.double() @ weight.double().t() + bias.double()) < 1e-6


@pytest.mark.cpp
@pytest.mark.parametrize(("shape", "k", "n"), [((7,), 5, 3), ((2, 9), 1300, 40), ((1500,), 8, 12), ((), 4, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(way, shape, k, n, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
    bias = torch.randn(n, requires_grad=True) if with_bias else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    upstream = torch.randn(*shape, n)
    y = linear(x, weight, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.linear(*exact)
    for ours, right in zip(
        (y, *torch.autograd.grad(y, leaves, upstream)),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        strict=True,
    ):
        assert ours.shape == right.shape
        assert relative_error(ours, right) < 1e-6


@pytest.mark.cpp
def test_linear_as_an_operator(native):
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 4), (3, 4), (3,)))
    torch.library.opcheck(native_linear.overload, (x, weight, bias))
    gradient = torch.autograd.grad(native_linear(x, weight, bias).sum(), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="linear has no second derivative"):
        gradient.sum().backward()


@pytest.mark.cpp
def test_what_is_left_to_pytorch(native, fresh):
    """Everything but plain fp32 on a CPU, and everything where another backend is asked for."""
    fresh.setenv(products.VARIABLE, "onednn")
    x, weight = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    name = lambda y: type(y.grad_fn).__name__  # noqa: E731
    assert name(linear(x, weight, None)) == "linearBackward"
    assert name(linear(x.double(), weight.double(), None)) != "linearBackward"
    with use_backend("reference"):
        assert name(linear(x, weight, None)) != "linearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16
    fresh.setenv(products.VARIABLE, "library")
    products.forget()
    assert name(linear(x, weight, None)) != "linearBackward"


def test_a_layer_with_a_hook_or_a_forward_of_its_own_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, layer, doubled = torch.randn(2, 3), nn.Linear(3, 3), Doubled(3, 3)
    torch.testing.assert_close(project(layer, x), layer(x))
    torch.testing.assert_close(project(doubled, x), doubled(x))
    layer.register_forward_hook(lambda *_: torch.zeros(1))
    assert project(layer, x).item() == 0
