"""The row kernels by themselves: blocks as the operators make them on a GPU, which no CPU tensor would bring about."""

import pytest
import torch

from repdeg_fast.contracts.linear_cross_entropy import Columns, Gradients, Head, LogitBlock, LossRule, Upstream, Wanted
from repdeg_fast.ops.linear_cross_entropy import operation

pytestmark = pytest.mark.interpreter
ROWS, VOCABULARY, TILE = 5, 70, 32


@pytest.fixture
def kernels():
    return operation.triton()


def logits_and_gradient(grad_loss, grad_lse, target, rule):
    """In float64 by PyTorch; logits far from zero, where 16 bits would round them by 32."""
    z = 30_000 + torch.randn(ROWS, VOCABULARY).mul(3).double()
    z = z.float().double().requires_grad_()
    lse = z.logsumexp(1)
    each = torch.nn.functional.cross_entropy(z, target, reduction="none", label_smoothing=rule.label_smoothing)
    ((each * grad_loss).sum() + (lse * grad_lse).sum()).backward()
    return z.detach(), lse.detach(), z.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_tile_of_wide_logits_to_a_gradient_of_its_own(kernels, dtype):
    rule = LossRule(-100, 0.1, 0.0)
    target = torch.tensor([0, 69, -100, 33, 31])
    grad_loss, grad_lse = torch.randn(ROWS), torch.randn(ROWS)
    z, lse, true = logits_and_gradient(grad_loss.double(), grad_lse.double(), target, rule)
    bias = torch.randn(VOCABULARY)
    parts, sums = [], torch.empty(VOCABULARY)
    for first in range(0, VOCABULARY, TILE):
        at = slice(first, min(first + TILE, VOCABULARY))
        logits = (z[:, at] - bias[at].double()).float()
        gradient = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
        block = LogitBlock(
            logits, lse.float(), None, sums[at], target, 0, bias[at], grad_loss, grad_lse,
            None if gradient is logits else gradient,
        )  # fmt: skip
        kernels.kernels.rows(block, Columns(first, VOCABULARY), rule, accumulate_bias=False)
        parts.append(gradient)
    made = torch.cat(parts, dim=1)
    assert made.dtype == dtype
    # logits and their log-sum-exp are rounded by 2e-3 there
    assert (made.double() - true).norm() <= 1e-2 * true.norm()
    assert (sums.double() - true.sum(0)).norm() <= 1e-2 * true.sum(0).norm()


@pytest.mark.parametrize("upstream", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (1.0, 3.0, 1.0), (1.0, -2.0, 0.0)])
def test_rescaling(kernels, upstream):
    """By one scale, or made again; hidden states always head by head."""
    heads, positions, d = 3, 4, 6
    hidden, weight = torch.randn(heads * positions, d), torch.randn(VOCABULARY, d)
    head, rule = Head(hidden, weight, torch.tensor([3, -100, 69, 0]), None), LossRule(-100, 0.0, 0.0)
    wanted, share = Wanted(True, True, False, torch.float32), kernels.share(head, rule, True)
    assert share == 1 / 3
    grad_heads = torch.tensor(upstream)
    rows = Upstream((grad_heads * share)[:, None].expand(heads, positions).reshape(-1))
    right = operation.reference.forward_backward(rows, head, rule, wanted)[2]
    made = kernels.forward_backward(Upstream(share.expand(heads * positions)), head, rule, wanted)[2]
    kernels.rescale_(made, grad_heads, lambda: rows, head, rule, wanted)
    torch.testing.assert_close(made, Gradients(*right), equal_nan=True)


def test_total(kernels):
    losses, share = torch.rand(3000), torch.tensor(0.25)
    torch.testing.assert_close(kernels.total(losses, 2, share), losses.view(2, -1).double().sum(1).float() / 4)
