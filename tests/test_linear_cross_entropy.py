"""Linear cross entropy: every backend and strategy against PyTorch's formula in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cross_entropy_cases import STRATEGIES, assert_close, cut_small, expected, expected_heads, inputs

import repdeg_fast
from repdeg_fast import linear_cross_entropy, multi_layer_mlm_loss
from repdeg_fast.ops.linear_cross_entropy import operation  # noqa: F401 - tells conftest where to test

# V, M, d: each of the awkward values at least twice, in different company
SHAPES = [(1, 3, 65), (7, 1, 1), (127, 129, 65), (127, 3, 768), (7, 129, 768), (1, 129, 1), (127, 1, 65)]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 2.0},
    {"reduction": "sum", "label_smoothing": 0.2, "softcap": 3.0},
    {"reduction": "none"},
]


@pytest.fixture
def small_buffers(monkeypatch):
    cut_small(monkeypatch)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(place, shape, strategy):
    for dtype, target_dtype in zip(place.dtypes(), itertools.cycle((torch.int64, torch.int32)), strict=False):
        hidden, weight, target, bias = inputs(*shape, dtype, place.device, target_dtype)
        loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
        loss.backward()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(loss, (hidden, weight, bias), *expected(hidden, weight, target, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_options_over_several_chunks_and_tiles(place, small_buffers, options, strategy):
    for dtype in place.dtypes():
        hidden, weight, target, bias = inputs(127, 67, 33, dtype, place.device)
        loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy, padding_idx=5, **options)
        upstream = torch.randn_like(loss)
        loss.backward(upstream)
        true = expected(hidden, weight, target, bias, padding_idx=5, upstream=upstream, **options)
        assert_close(loss, (hidden, weight, bias), *true, TOLERANCE[dtype])
        assert not weight.grad[5].any()


FEATURES = ("smoothing", "softcap", "lse", "rows", "heads", "strides", "no bias")
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if pair != ("lse", "heads")]  # K losses have no lse


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("features", PAIRS, ids=" and ".join)
def test_options_in_pairs(place, small_buffers, features, strategy):
    """What each option does right alone, two may do wrong together; over several chunks and tiles."""
    heads, rows = (3 if "heads" in features else 1), 37
    hidden, weight, target, bias = inputs(200, rows, 17, device=place.device, heads=heads)
    if "strides" in features:  # the two unequal, neither of unit stride along its rows
        hidden = hidden.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
        weight = weight.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
        bias = torch.stack([bias.detach(), -bias.detach()], dim=1)[:, 0].requires_grad_()
    leaves = [hidden, weight, None if "no bias" in features else bias]
    options = {"reduction": "none" if "rows" in features else "mean", "padding_idx": 5, "strategy": strategy}
    options |= {"label_smoothing": 0.2} if "smoothing" in features else {}
    options |= {"softcap": 1.5} if "softcap" in features else {}
    if "heads" in features:
        loss, lse = multi_layer_mlm_loss(leaves[0], weight, target, leaves[2], **options), None
    else:
        loss = linear_cross_entropy(
            hidden[0], weight, target, leaves[2], return_lse="lse" in features, **options
        )  # fmt: skip
        loss, lse = loss if "lse" in features else (loss, None)
    upstream = torch.randn(*loss.shape, 2, device=place.device)[..., 0]
    lse_upstream = torch.randn(rows, 2, device=place.device)[:, 0]
    total = (loss * upstream).sum() + (0 if lse is None else (lse * lse_upstream).sum())
    given = [leaf for leaf in leaves if leaf is not None]
    true = _pair_in_float64(leaves, target, options, upstream, None if lse is None else lse_upstream)
    terms = (loss * upstream).abs().sum() + (0 if lse is None else (lse * lse_upstream).abs().sum())
    assert (total.cpu() - true[0]).abs() <= 1e-5 * terms.cpu()  # of either sign, they may cancel
    for ours, theirs in zip(torch.autograd.grad(total, given), true[1:], strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def _pair_in_float64(leaves, target, options, upstream, lse_upstream):
    leaves = [None if t is None else t.detach().cpu().double().requires_grad_() for t in leaves]
    z = F.linear(*leaves)  # (K, M, V)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    smoothing, reduction = options.get("label_smoothing", 0.0), options["reduction"]
    loss = torch.stack([F.cross_entropy(h, target.cpu(), reduction=reduction, label_smoothing=smoothing) for h in z])
    total = (loss.view(upstream.shape) * upstream.cpu()).sum()
    if lse_upstream is not None:
        total = total + (z[0].logsumexp(-1) * lse_upstream.cpu()).sum()
    gradients = list(torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None]))
    gradients[1][options["padding_idx"]] = 0
    return total, *gradients


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_real_vocabulary(strategy):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, target, bias = inputs(30522, 129, 65, dtype)
        loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
        loss.backward()
        assert_close(loss, (hidden, weight, bias), *expected(hidden, weight, target, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("view", ["transposed", "columns", "rows"])
def test_strides(place, small_buffers, view, strategy):
    base = torch.randn(130, 130, device=place.device) / 8
    weight = {"transposed": base.T, "columns": base[:, ::2], "rows": base[::2]}[view].detach().requires_grad_()
    hidden = torch.randn(weight.shape[1], 6, device=place.device).T.detach().requires_grad_()
    target = torch.arange(12, device=place.device)[::2]
    loss = linear_cross_entropy(hidden, weight, target, strategy=strategy)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    true_loss, true_gradients = expected(hidden, weight, target)
    assert relative_error(loss, true_loss) <= 1e-5
    for gradient, true in zip(gradients, true_gradients[:2], strict=True):
        assert relative_error(gradient, true) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("head_weight", [(1, 1, 1), (0.25, 0.25, 0.25), (1, -2, 0)], ids=str)
def test_heads_may_be_weighted_in_any_way(place, head_weight, strategy):
    for dtype in place.dtypes():
        hidden, weight, target, bias = inputs(50, 21, 33, dtype, place.device, heads=3)
        losses = multi_layer_mlm_loss(hidden, weight, target, bias, strategy=strategy, padding_idx=-1)
        upstream = torch.tensor(head_weight, dtype=losses.dtype, device=place.device)
        (losses * upstream).sum().backward()
        true_losses, true_gradients = expected_heads(hidden, weight, target, bias, upstream)
        true_gradients[1][-1] = 0
        assert losses.shape == (3,)
        assert_close(losses, (hidden, weight, bias), true_losses, true_gradients, TOLERANCE[dtype])


def test_heads_as_a_sequence_and_without_reduction(place):
    hidden, weight, target, bias = inputs(50, 21, 33, device=place.device, heads=2)
    stacked = multi_layer_mlm_loss(hidden, weight, target, bias)
    assert torch.equal(multi_layer_mlm_loss(list(hidden), weight, target, bias), stacked)
    rows = multi_layer_mlm_loss(hidden, weight, target, bias, reduction="none")
    assert rows.shape == (2, 21)
    assert relative_error(rows.sum(1) / (target != -100).sum(), stacked) <= 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_log_sum_exp_is_differentiable(place, strategy):
    """As z-losses need it; also of rows whose target is ignored."""
    hidden, weight, target, bias = inputs(40, 12, 9, device=place.device)
    loss, lse = linear_cross_entropy(hidden, weight, target, bias, return_lse=True, strategy=strategy)
    (loss + 0.1 * lse.square().mean()).backward()
    leaves = [t.detach().cpu().double().requires_grad_() for t in (hidden, weight, bias)]
    z = F.linear(*leaves)
    true_lse = z.logsumexp(-1)
    (F.cross_entropy(z, target.cpu()) + 0.1 * true_lse.square().mean()).backward()
    assert relative_error(lse, true_lse) <= 1e-5
    for leaf, true in zip((hidden, weight, bias), leaves, strict=True):
        assert relative_error(leaf.grad, true.grad) <= 1e-5


def test_any_leading_shape(place):
    hidden, weight, target, bias = inputs(20, 24, 8, device=place.device)
    flat = linear_cross_entropy(hidden, weight, target, bias, reduction="none")
    folded = linear_cross_entropy(hidden.view(2, 3, 4, 8), weight, target.view(2, 3, 4), bias, reduction="none")
    assert torch.equal(folded, flat.view(2, 3, 4))
    one = linear_cross_entropy(hidden[0], weight, target[0], bias)
    assert one.shape == ()
    assert relative_error(one, flat[0]) <= 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [0, 4])
def test_no_target_counts(place, rows, strategy):
    """PyTorch's mean over nothing is NaN; ours is 0 with zero gradients, so that a batch without masks is harmless."""
    hidden, weight, _, bias = inputs(10, rows, 8, device=place.device)
    target = torch.full((rows,), -100, device=place.device)
    loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
    loss.backward()
    assert loss.item() == 0
    assert not any(t.grad.any() for t in (hidden, weight, bias))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_gradients_that_are_needed(place, strategy):
    for needed in range(3):
        hidden, weight, target, bias = inputs(30, 10, 8, device=place.device)
        leaves = (hidden, weight, bias)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == needed)
        linear_cross_entropy(hidden, weight, target, bias, strategy=strategy).backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]
        true = expected(hidden, weight, target, bias)[1][needed]
        assert relative_error(leaves[needed].grad, true) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_graph_can_be_run_twice(place, strategy):
    """Chunked gives its gradients away, scaled, the first time."""
    hidden, weight, target, bias = inputs(30, 10, 8, device=place.device)
    loss = 3 * linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
    leaves = (hidden, weight, bias)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    true = expected(hidden, weight, target, bias, upstream=torch.tensor(3.0))[1]
    for a, b, c in zip(first, second, true, strict=True):
        assert relative_error(a, c) <= 1e-5
        assert relative_error(b, c) <= 1e-5


@settings(max_examples=15, deadline=None)
@given(
    vocabulary=st.integers(1, 90), rows=st.integers(0, 40), width=st.integers(1, 40), heads=st.integers(1, 3),
    strategy=st.sampled_from(STRATEGIES), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(vocabulary, rows, width, heads, strategy, seed):
    torch.manual_seed(seed)
    hidden, weight, target, bias = inputs(vocabulary, rows, width, torch.float64, heads=heads)
    with repdeg_fast.use_backend("cpu"):
        losses = multi_layer_mlm_loss(hidden, weight, target, bias, strategy=strategy, reduction="sum")
        losses.sum().backward()
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    z = F.linear(*leaves).view(heads * rows, vocabulary)
    true = F.cross_entropy(z, target.repeat(heads), reduction="none").view(heads, rows).sum(1)
    true.sum().backward()
    assert_close(losses, (hidden, weight, bias), true, [t.grad for t in leaves], 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, strategy):
    hidden, weight, target, bias = inputs(5, 4, 3, torch.float64, heads=2)

    def heads(hidden, weight, bias):
        return multi_layer_mlm_loss(hidden, weight, target, bias, strategy=strategy)

    def with_options(hidden, weight, bias):
        options = {"label_smoothing": 0.1, "softcap": 1.5, "reduction": "none", "return_lse": True}
        return linear_cross_entropy(hidden[0], weight, target, bias, strategy=strategy, **options)

    with repdeg_fast.use_backend(backend):
        for function in (heads, with_options):
            assert torch.autograd.gradcheck(function, (hidden, weight, bias), fast_mode=True)
