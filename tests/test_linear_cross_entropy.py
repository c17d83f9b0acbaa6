"""Linear cross entropy: every backend and strategy against PyTorch's formula in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cross_entropy_cases import STRATEGIES, assert_close, expected, expected_heads, inputs

import repdeg_fast
from repdeg_fast import linear_cross_entropy, multi_layer_mlm_loss
from repdeg_fast.native import build
from repdeg_fast.ops import _vocabulary_chunks
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
    """Several chunks of rows and tiles of the vocabulary also at test sizes."""
    monkeypatch.setattr(_vocabulary_chunks, "LIMIT", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(_vocabulary_chunks, "TILE", 48)


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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_not_masked(place, bad, strategy):
    hidden, weight, target, bias = inputs(30, 10, 8, device=place.device)
    hidden.data[2, 3] = bad
    loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
    loss.backward()
    assert loss.isnan()
    assert hidden.grad[2].isnan().all()
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("masked", ["first", "last"])
def test_a_masked_vocabulary(place, small_buffers, masked, options, strategy):
    """Logits of −∞ are legal, also where a tile or a whole part of the vocabulary has no others."""
    vocabulary = {"chunked": 4400, "streaming": 300}[strategy]  # the row kernels take thousands of logits at once
    for dtype in place.dtypes():
        hidden, weight, target, bias = inputs(vocabulary, 5, 9, dtype, place.device)
        bias.data[slice(-100) if masked == "first" else slice(100, None)] = -float("inf")
        target[0], target[2] = 0, vocabulary - 1  # one of them has a loss of infinity
        loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy, reduction="sum", **options)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        true_loss, true_gradients = expected(hidden, weight, target, bias, reduction="sum", **options)
        assert loss.item() == true_loss if true_loss.isinf() else relative_error(loss, true_loss) <= TOLERANCE[dtype]
        for gradient, true in zip(gradients, true_gradients, strict=True):
            assert relative_error(gradient, true) <= TOLERANCE[dtype]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_row_of_nothing_but_minus_infinity(place, ignored, strategy):
    """Its log-sum-exp is −∞, and it has no softmax; where it is ignored, no other row notices."""
    hidden, weight, target, bias = inputs(127, 10, 33, device=place.device)
    weight.data[:, 0] = weight.data[:, 0].abs() + 0.1
    hidden.data[2, 0] = -float("inf")
    target[2] = -100 if ignored else 5
    others = torch.arange(10) != 2
    loss, lse = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy, reduction="none", return_lse=True)
    assert lse.isneginf().tolist() == (~others).tolist()
    assert loss.isnan().tolist() == [not ignored and not other for other in others]
    total = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy, reduction="sum")
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(total, (hidden, weight, bias))
    true_loss, true = expected(hidden[others], weight, target[others], bias, reduction="sum")
    assert relative_error(grad_hidden[others], true[0]) <= 1e-5
    if ignored:
        assert relative_error(total, true_loss) <= 1e-5
        assert relative_error(grad_weight[:, 1:], true[1][:, 1:]) <= 1e-5  # 0·∞ in the first column
        assert relative_error(grad_bias, true[2]) <= 1e-5
    else:
        assert all(t.isnan().all() for t in (total, grad_hidden[2], grad_weight, grad_bias))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_logits_far_from_zero(place, offset, options):
    """Operands whose logits are exact in fp32 show what the softmax alone adds: no more than PyTorch's own."""
    hidden, weight, target, _ = (t.detach() for t in inputs(500, 20, 9, device=place.device))
    hidden, weight = (hidden * 4).round() / 4, (weight * 12).round() / 4
    bias = torch.full((500,), offset, device=place.device)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    true_loss, true_gradients = expected(hidden, weight, target, bias, **options)
    theirs = F.cross_entropy(F.linear(*leaves), target, **options)
    ours = linear_cross_entropy(hidden, weight, target, bias, strategy="chunked", **options)
    assert relative_error(ours, true_loss) <= 2 * relative_error(theirs, true_loss) + 1e-7
    gradients = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    for our, their, true in zip(*gradients, true_gradients, strict=True):
        assert relative_error(our, true) <= 2 * relative_error(their, true) + 1e-7


def test_large_logits_do_not_overflow(place):
    hidden, weight, target, bias = inputs(30, 10, 8, device=place.device)
    hidden.data *= 1e4
    loss = linear_cross_entropy(hidden, weight, target, bias)
    loss.backward()
    assert_close(loss, (hidden, weight, bias), *expected(hidden, weight, target, bias), 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_twice(place, strategy):
    hidden, weight, target, bias = inputs(127, 65, 40, device=place.device)
    results = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_the_row_pass_do_not_depend_on_threads(dtype):
    """The GEMMs are the vendor's."""
    rows = build.operators("linear_cross_entropy", "rows")
    build.load("cpu")
    logits, target, bias = torch.randn(33, 5000).to(dtype), torch.randint(0, 5000, (33,)), torch.randn(5000)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, lse, loss, grad_bias = logits.clone(), torch.empty(33), torch.empty(33), torch.empty(5000)
        rows.rows(
            out, lse, loss, grad_bias, target, bias, torch.ones(33), None, 5000, 0, 0, -100, 0.1, 4.0, False
        )  # fmt: skip
        results.append((out, lse, loss, grad_bias))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_keeps_an_fp32_weight(small_buffers, strategy):
    """The hidden states are converted and say what is multiplied; the weight and its gradient stay in fp32."""
    hidden, weight, target, bias = inputs(127, 65, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.utils.checkpoint.checkpoint(
            lambda h: linear_cross_entropy(h, weight, target, bias, strategy=strategy), hidden, use_reentrant=False
        )
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, (hidden, weight, bias), *expected(hidden, weight, target, bias), 1e-2)


def test_sums_over_chunks_in_fp32(small_buffers):
    """A bf16 gradient that is summed over many chunks in bf16 drifts; ours is summed in fp32 and rounded once."""
    hidden, weight, target, _ = inputs(20, 2000, 8, torch.bfloat16)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, strategy="chunked", accumulate_dtype=dtype)
        (gradient,) = torch.autograd.grad(loss, weight)
        errors.append(relative_error(gradient, expected(hidden, weight, target)[1][1]))
    assert errors[0] <= 4e-3
    assert errors[1] > 2 * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_target_out_of_range_is_nan_on_a_gpu(strategy):
    hidden, weight, target, bias = inputs(30, 10, 8, device="cuda")
    target[3], target[4] = 30, -7
    loss = linear_cross_entropy(hidden, weight, target, bias, reduction="none", strategy=strategy)
    assert loss.isnan().nonzero().flatten().tolist() == [3, 4]
    loss = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy)
    loss.backward()
    assert loss.isnan()
