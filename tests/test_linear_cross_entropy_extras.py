"""Class weights, z-loss, predictions, shift and the gradient filter of the linear cross entropy: every backend against
the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, relative_error
from linear_cross_entropy_cases import STRATEGIES, cut_small, inputs

import repdeg_fast
from repdeg_fast import linear_cross_entropy, multi_layer_mlm_loss
from repdeg_fast.ops import products
from repdeg_fast.ops.linear_cross_entropy import operation  # noqa: F401 - tells conftest where to test

V, M, D, K = 70, 21, 9, 2
EXTRAS = [
    {"class_weight": True},
    {"lse_square_scale": 1e-2},
    {"label_smoothing": 1.0},
    {"gradient_filter": 1 / V},
    {"class_weight": True, "lse_square_scale": 1e-2, "label_smoothing": 0.3, "softcap": 2.0},
    {
        "class_weight": True,
        "lse_square_scale": 1e-2,
        "label_smoothing": 1.0,
        "gradient_filter": 0.5 / V,
        "softcap": 3.0,
    },
]
TWO = EXTRAS[-2:]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    cut_small(monkeypatch)


def with_weights(options, device, dtype=torch.float32, vocabulary=V):
    """A class or two that weigh nothing."""
    if not options.get("class_weight"):
        return options
    weights = torch.rand(vocabulary, dtype=torch.float64).mul(2).to(dtype)
    weights[[3, 57]] = 0
    return options | {"class_weight": weights.to(device)}


def in_float64(leaves, target, options, reduction, upstream, lse_upstream=None):
    """Losses (K,) or (K, M), z-losses alike, and the gradients, by PyTorch's formula."""
    hidden, weight, bias = (t.detach().cpu().double().requires_grad_() for t in leaves)
    target, softcap, vocabulary = target.cpu().long(), options.get("softcap"), len(weight)
    z = F.linear(hidden, weight, bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse, counts = z.logsumexp(-1), target != -100
    if "gradient_filter" in options:
        p = z.softmax(-1)
        kept = (p >= options["gradient_filter"]) | (torch.arange(vocabulary) == target[:, None])
        z = z.where(kept, z.detach())  # the logit is there, its gradient is not
        z, lse = z + 0, lse.detach() + ((z - z.detach()) * p.detach()).sum(-1)
    class_weight = options.get("class_weight")
    class_weight = torch.ones(vocabulary).double() if class_weight is None else class_weight.cpu().double()
    y = options.get("label_smoothing", 0.0) / vocabulary * class_weight.repeat(len(target), 1)
    safe = target.masked_fill(~counts, 0)
    own = (1 - options.get("label_smoothing", 0.0)) * class_weight[safe]
    y = y.scatter_add(1, safe[:, None], own[:, None]) * counts[:, None]
    loss = y.sum(-1) * lse - (y * z).sum(-1)
    z_loss = options.get("lse_square_scale", 0.0) * lse.square() * counts
    if reduction != "none":
        loss, z_loss = loss.sum(-1), z_loss.sum(-1)
    if reduction == "mean":
        loss, z_loss = loss / class_weight[target[counts]].sum(), z_loss / counts.sum()
    total = ((loss + z_loss) * upstream.cpu()).sum()
    if lse_upstream is not None:
        total = total + (lse * lse_upstream.cpu()).sum()
    return loss + z_loss, z_loss, torch.autograd.grad(total, (hidden, weight, bias))


def assert_right(leaves, losses, z_loss, true, tolerance):
    true_losses, true_z, gradients = true
    assert relative_error(losses, true_losses) <= tolerance
    assert relative_error(z_loss, true_z) <= tolerance if true_z.any() else not z_loss.any()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad, gradient) <= tolerance


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", EXTRAS, ids=lambda options: ",".join(options))
def test_value_and_gradients_of_heads(place, options, strategy):
    """Heads that weigh alike, so that chunked scales what it made; and a definition that is PyTorch's own."""
    for dtype in place.dtypes():
        hidden, weight, target, bias = inputs(V, M, D, dtype, place.device, heads=K)
        given, leaves = with_weights(options, place.device), (hidden, weight, bias)
        found = multi_layer_mlm_loss(hidden, weight, target, bias, strategy=strategy, return_z_loss=True, **given)
        (0.5 * found.loss.sum()).backward()
        true = in_float64(leaves, target, given, "mean", torch.full((K,), 0.5))
        assert_right(leaves, found.loss, found.z_loss, true, TOLERANCE[dtype])
        if "gradient_filter" not in options and "lse_square_scale" not in options:
            own = {"weight": given.get("class_weight"), "label_smoothing": options.get("label_smoothing", 0.0)}
            own["weight"] = None if own["weight"] is None else own["weight"].cpu().double()
            theirs = F.cross_entropy(F.linear(*(t.detach().cpu().double() for t in leaves))[0], target.cpu(), **own)
            assert relative_error(found.loss[0], theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("reduction", "options"), [("none", TWO[1]), ("sum", TWO[0]), ("mean", TWO[1])], ids=["none", "sum", "mean"]
)
def test_heads_that_weigh_differently(place, options, reduction, strategy):
    hidden, weight, target, bias = inputs(V, M, D, device=place.device, heads=K)
    given, leaves = with_weights(options, place.device, torch.float64), (hidden, weight, bias)
    call = {"strategy": strategy, "reduction": reduction, "return_z_loss": True}
    found = multi_layer_mlm_loss(hidden, weight, target, bias, **call, **given)
    upstream = torch.randn_like(found.loss)
    (found.loss * upstream).sum().backward()
    true = in_float64(leaves, target, given, reduction, upstream)
    assert_right(leaves, found.loss, found.z_loss, true, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", TWO, ids=["smoothed", "filtered"])
def test_with_a_gradient_of_the_log_sum_exp(place, options, strategy):
    """Also in rows that do not count, and twice through one graph."""
    hidden, weight, target, bias = inputs(V, M, D, device=place.device)
    given, leaves = with_weights(options, place.device), (hidden, weight, bias)
    loss, lse = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy, return_lse=True, **given)
    upstream = torch.randn(M)
    total = 2 * loss + (lse * upstream.to(place.device)).sum()
    true = in_float64((hidden[None], weight, bias), target, given, "mean", torch.tensor([2.0]), upstream)
    for _ in range(2):
        gradients = torch.autograd.grad(total, leaves, retain_graph=True)
        for ours, theirs in zip(gradients, true[2], strict=True):
            assert relative_error(ours, theirs.view(ours.shape)) <= 1e-5


@pytest.mark.parametrize(
    ("strategy", "gradients"),
    [("chunked", True), ("streaming", True), ("auto", False)],
    ids=["chunked", "streaming", "evaluation"],
)
def test_predictions_and_accuracy(place, strategy, gradients):
    """The first of the largest logits: rows of E that occur twice tie, and one row of h ties everywhere."""
    for dtype in place.dtypes():
        hidden, weight, target, bias = inputs(V, M, D, dtype, place.device, heads=K)
        with torch.no_grad():
            weight[40:] = weight[:30]
            bias[40:] = bias[:30]
            hidden[1, 2] = 0
            bias[33:39] = bias.max() + 1
            target[0] = F.linear(hidden, weight, bias)[1, 0].argmax()
        ask = {"return_predictions": True, "return_accuracy": True, "strategy": strategy, "softcap": 30.0}
        with torch.set_grad_enabled(gradients):
            found = multi_layer_mlm_loss(hidden, weight, target, bias, **ask)
            plain = multi_layer_mlm_loss(hidden, weight, target, bias, strategy=strategy, softcap=30.0)
        z = F.linear(*(t.detach().cpu().double() for t in (hidden, weight, bias)))
        best = z.topk(2).values
        clear = (best[..., 0] - best[..., 1] == 0) | (best[..., 0] - best[..., 1] > 0.02)
        predicted, true = found.predictions.cpu(), z.argmax(-1)
        assert predicted.dtype == torch.int64
        assert clear.sum() > 0.9 * clear.numel()
        assert torch.equal(predicted[clear], true[clear])
        assert predicted[1, 2] == 33
        right = ((predicted == target.cpu()) & (target.cpu() != -100)).sum(1) / (target.cpu() != -100).sum()
        assert torch.equal(found.accuracy.cpu(), right.float())
        assert found.accuracy[1] > 0
        assert torch.equal(found.loss, plain)
        assert found.z_loss is None


LONG = 4200  # a vocabulary of several steps of the row kernels


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_vocabulary(place, strategy):
    """Whose last classes have the largest logits and weigh more than those before."""
    hidden, weight, target, bias = inputs(LONG, 3, 5, device=place.device, heads=1)
    given = with_weights(TWO[0], place.device, vocabulary=LONG)
    with torch.no_grad():
        bias[:-50] -= 4
        bias[-50:] += 4
    given["class_weight"][:-50] /= 4
    found = multi_layer_mlm_loss(hidden, weight, target, bias, strategy=strategy, return_z_loss=True, **given)
    found.loss.sum().backward()
    true = in_float64((hidden, weight, bias), target, given, "mean", torch.ones(1))
    assert_right((hidden, weight, bias), found.loss, found.z_loss, true, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predictions_where_nothing_is_larger(place, strategy):
    """A vocabulary that is masked, whole or but for its last word; −∞ everywhere is a tie."""
    hidden, weight, _, _ = inputs(LONG, 3, 5, device=place.device)
    bias = torch.full((LONG,), -torch.inf, device=place.device)
    target = torch.full((3,), -100, device=place.device)
    ask = {"return_predictions": True, "strategy": strategy}
    predict = lambda: linear_cross_entropy(hidden, weight, target, bias, **ask).predictions.tolist()  # noqa: E731
    assert predict() == [0, 0, 0]
    bias[-1] = 0
    assert predict() == [LONG - 1] * 3
    with torch.no_grad():
        hidden.zero_()
    bias[[20, 4150, LONG - 1]] = 1
    assert predict() == [20] * 3
    assert linear_cross_entropy(hidden, weight, target, bias, return_accuracy=True).accuracy == 0


def test_predictions_behind_the_first_classes(place):
    """Kernels look for the place of the largest logit some hundred classes at a time."""
    hidden, weight = torch.randn(6, 8), torch.randn(700, 8)
    target = torch.zeros(6, dtype=torch.int64)
    found = linear_cross_entropy(*(t.to(place.device) for t in (hidden, weight, target)), return_predictions=True)
    expected = (hidden.double() @ weight.double().T).argmax(1)
    assert expected.max() >= 512
    assert torch.equal(found.predictions.cpu(), expected)


@pytest.mark.parametrize("shift", [True, 2, 9, 0], ids=str)
def test_shift(place, shift):
    """Positions predict later ones; what is a value a position is as long as the others."""
    steps = int(shift)
    hidden, weight, target, bias = inputs(V, 4 * 8, D, device=place.device)
    hidden, target = hidden.detach().view(2, 2, 8, D).requires_grad_(), target.view(2, 2, 8)
    ask = {"return_lse": True, "return_z_loss": True, "return_predictions": True, "return_accuracy": True}
    ask |= {"lse_square_scale": 0.1}
    rows = linear_cross_entropy(hidden, weight, target, bias, shift=shift, reduction="none", **ask)
    mean = linear_cross_entropy(hidden, weight, target, bias, shift=shift, **ask)
    kept = max(8 - steps, 0)
    left, right = hidden[:, :, :kept], target[:, :, steps:].contiguous()
    for name, ours, theirs in (
        *zip(rows._fields, rows, linear_cross_entropy(left, weight, right, bias, reduction="none", **ask), strict=True),
        *zip(mean._fields, mean, linear_cross_entropy(left, weight, right, bias, **ask), strict=True),
    ):
        assert ours.shape == theirs.shape, name
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6), name
    (gradient,) = torch.autograd.grad(mean.loss, hidden)
    assert gradient.shape == hidden.shape
    assert not gradient[:, :, kept:].any()
    plain = linear_cross_entropy(hidden, weight, target, bias, shift=shift, reduction="none")
    assert plain.shape == (2, 2, kept)
    loss, lse = linear_cross_entropy(hidden, weight, target, bias, shift=shift, return_lse=True)
    assert (loss.shape, lse.shape) == ((), (2, 2, kept))


def test_no_target_counts(place):
    """Nothing to divide by: every result is 0, and no gradient is poisoned. So where all that counts weighs nothing."""
    hidden, weight, target, bias = inputs(V, 4, D, device=place.device)
    ask = {"return_z_loss": True, "return_accuracy": True, "lse_square_scale": 0.1}
    ones, none = torch.ones(V, device=place.device), torch.zeros(V, device=place.device)
    found = linear_cross_entropy(hidden, weight, torch.full_like(target, -100), bias, class_weight=ones, **ask)
    found.loss.backward()
    assert (found.loss, found.z_loss, found.accuracy) == (0, 0, 0)
    assert not any(t.grad.any() for t in (hidden, weight, bias))
    found = linear_cross_entropy(hidden, weight, target, bias, class_weight=none, **ask)
    assert relative_error(found.loss, found.z_loss) <= 1e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_error_of_the_gradient_filter(backend):
    """The bound of the docstring, by class and in sum; no bit of the rest changes."""
    hidden, weight, target, bias = inputs(V, M, D, torch.float64)
    target[target == -100] = 0
    eye, logits = torch.eye(V).double(), (3 * F.linear(hidden, weight, bias)).detach().requires_grad_()

    def gradient(gradient_filter, **options):
        with repdeg_fast.use_backend(backend):
            loss = linear_cross_entropy(
                logits, eye, target, gradient_filter=gradient_filter, reduction="sum", **options
            )
        return torch.autograd.grad(loss, logits)[0]

    p = logits.detach().softmax(-1)
    for threshold in (1e-4, 1e-2, 0.2):
        left_out = (p < threshold) & (torch.arange(V) != target[:, None])
        for smoothing in (0.0, 0.1):
            exact = gradient(None, label_smoothing=smoothing)
            error = (gradient(threshold, label_smoothing=smoothing) - exact).abs()
            assert not error[~left_out].any()
            assert torch.equal(error[left_out], exact[left_out].abs())
            assert error.max() < threshold + smoothing / V
            assert (error.sum(1) <= (p * left_out).sum(1) + smoothing + 1e-12).all()
    assert left_out.float().mean() > 0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_filter_spares_products(dtype, strategy, monkeypatch):
    """On a CPU: confident rows leave few columns, in some tiles none. The gradients are those of the reference."""
    hidden, weight, target, bias = inputs(200, M, D, dtype)
    with torch.no_grad():
        bias[90:] -= 40
        target[target >= 90] = 3
        hidden.mul_(4)
    columns = []
    add = products.Sum.add
    monkeypatch.setattr(
        products.Sum, "add", lambda self, a, b, *rest: columns.append(a.numel()) or add(self, a, b, *rest)
    )
    gradients = {}
    for backend, gradient_filter in (("cpu", None), ("cpu", 0.2), ("reference", 0.2)):
        columns.clear()
        with repdeg_fast.use_backend(backend):
            loss = linear_cross_entropy(
                hidden, weight, target, bias, strategy=strategy, gradient_filter=gradient_filter, padding_idx=7
            )
            gradients[backend, gradient_filter] = torch.autograd.grad(loss, (hidden, weight, bias)), sum(columns)
    (filtered, fewer), (_, whole) = gradients["cpu", 0.2], gradients["cpu", None]
    assert 0 < fewer < 0.6 * whole
    for ours, theirs in zip(filtered, gradients["reference", 0.2][0], strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]


def test_a_module_passes_them_on():
    """Of masked positions alone."""
    head = repdeg_fast.MultiLayerMLMHead(D, torch.nn.Embedding(V, 6))
    layers, labels = torch.randn(K, 2, 7, D), torch.randint(0, V, (2, 7))
    labels[:, ::3] = -100
    options = with_weights(TWO[0], "cpu") | {"return_z_loss": True, "return_predictions": True, "return_accuracy": True}
    found = head(layers, labels, **options)
    rows, masked = head.transform(layers)[:, labels != -100], labels[labels != -100]
    expected = multi_layer_mlm_loss(rows, head.weight, masked, head.bias, **options)
    assert found.predictions.shape == (K, len(masked))
    assert found.lse is expected.lse is None
    for mine, right in zip(found._replace(lse=found.loss), expected._replace(lse=expected.loss), strict=True):
        torch.testing.assert_close(mine, right)


def test_second_call_of_a_compiled_graph():
    """One graph with everything; meta shapes are those of the CPU."""
    hidden, weight, target, bias = inputs(V, M, D)
    given = with_weights(EXTRAS[-1], "cpu")
    ask = {"return_lse": True, "return_z_loss": True, "return_predictions": True, "return_accuracy": True, "shift": 1}

    def step(hidden, weight, target, bias):
        return linear_cross_entropy(hidden, weight, target, bias, **ask, **given)

    plain = step(hidden, weight, target, bias)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, target, bias)
    given = given | {"class_weight": given["class_weight"].to("meta")}
    meta = step(*(t.detach().to("meta") for t in (hidden, weight, target, bias)))
    for ours, theirs, shape in zip(compiled, plain, meta, strict=True):
        assert torch.allclose(ours, theirs)
        assert (shape.shape, shape.dtype) == (theirs.shape, theirs.dtype)
    for ours, theirs in zip(
        *(torch.autograd.grad(o.loss, (hidden, weight, bias)) for o in (compiled, plain)), strict=True
    ):
        assert relative_error(ours, theirs) <= 1e-6
