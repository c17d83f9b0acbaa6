"""Linear cross entropy where rounding shows, and where logits are not numbers or infinite."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, relative_error
from linear_cross_entropy_cases import STRATEGIES, assert_close, cut_small, expected, inputs

from repdeg_fast import linear_cross_entropy
from repdeg_fast.contracts.linear_cross_entropy import Columns, LogitBlock, LossRule
from repdeg_fast.native import build
from repdeg_fast.native.linear_cross_entropy import RowKernels
from repdeg_fast.ops.linear_cross_entropy import operation  # noqa: F401 - tells conftest where to test


@pytest.fixture
def small_buffers(monkeypatch):
    cut_small(monkeypatch)


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


def test_every_probability_is_accurate(place):
    """Not in norm alone: logits that are no sums and no roundings, exact in fp32, show the exponential as it is."""
    logits = torch.arange(-40, 1, dtype=torch.float32).mul(0.5).repeat(2, 1).to(place.device).requires_grad_()
    eye = torch.eye(41, device=place.device)
    target = torch.full((2,), -100, device=place.device)
    _, lse = linear_cross_entropy(logits, eye, target, return_lse=True, strategy="chunked")
    (p,) = torch.autograd.grad(lse.sum(), logits)
    true = logits.detach().double().softmax(1)
    assert ((p.double() - true).abs() / true).max() <= 3e-6


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
def test_bits_of_the_row_pass_do_not_depend_on_threads(dtype, threads):
    """The GEMMs are the vendor's."""
    build.load("cpu")
    kernels, rule = RowKernels(torch.ops.repdeg_fast_native), LossRule(-100, 0.1, 4.0)
    logits, target, bias = torch.randn(33, 5000).to(dtype), torch.randint(0, 5000, (33,)), torch.randn(5000)
    results = []
    for number in (1, 2, 3):
        threads(number)
        out, lse, loss, grad_bias = logits.clone(), torch.empty(33), torch.empty(33), torch.empty(5000)
        block = LogitBlock(out, lse, loss, grad_bias, target, 0, bias, torch.ones(33), None)
        kernels.rows(block, Columns(0, 5000), rule, accumulate_bias=False)
        results.append((out, lse, loss, grad_bias))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


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
    """A 16-bit gradient that is summed over many chunks in 16 bits drifts; ours is summed in fp32 and rounded once."""
    for narrow, rounding in ((torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        hidden, weight, target, _ = inputs(20, 2000, 8, narrow)
        errors = []
        for dtype in (torch.float32, narrow):
            loss = linear_cross_entropy(hidden, weight, target, strategy="chunked", accumulate_dtype=dtype)
            (gradient,) = torch.autograd.grad(loss, weight)
            errors.append(relative_error(gradient, expected(hidden, weight, target)[1][1]))
        assert errors[0] <= rounding
        assert 2 * errors[0] < errors[1] <= 16 * rounding


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
