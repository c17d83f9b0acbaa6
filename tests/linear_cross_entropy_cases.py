"""Operands of a linear cross entropy, and what PyTorch's formula makes of them in float64."""

import torch
import torch.nn.functional as F
from helpers import relative_error

from repdeg_fast.ops import buffers, chunked_logits, native_linear_cross_entropy

STRATEGIES = ("chunked", "streaming")


def cut_small(monkeypatch):
    """Several chunks of rows and tiles of the vocabulary also at test sizes."""
    monkeypatch.setattr(buffers, "LIMIT", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(chunked_logits, "TILE", 48)
    monkeypatch.setattr(native_linear_cross_entropy, "SMALL", 0)


def inputs(vocabulary, rows, width, dtype=torch.float32, device="cpu", target_dtype=torch.int64, heads=None):
    """Hidden states, weight, target (some ignored) and bias; logits of size about 1, so that no class vanishes."""
    shape = (rows, width) if heads is None else (heads, rows, width)
    hidden = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64) / width**0.5
    bias = torch.randn(vocabulary, dtype=torch.float64)
    target = torch.randint(0, vocabulary, (rows,))
    target[1::5] = -100
    hidden, weight, bias = (t.to(dtype).to(device).requires_grad_() for t in (hidden, weight, bias))
    return hidden, weight, target.to(target_dtype).to(device), bias


def expected(hidden, weight, target, bias=None, *, softcap=None, padding_idx=None, upstream=None, **options):
    """Loss and gradients of PyTorch's own functions, in float64 on the CPU."""
    leaves = [None if t is None else t.detach().cpu().double().requires_grad_() for t in (hidden, weight, bias)]
    z = F.linear(*leaves)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    target = target.cpu().long()
    loss = F.cross_entropy(z.flatten(0, -2), target.flatten(), **options)
    loss = loss.view(target.shape) if options.get("reduction") == "none" else loss
    loss.backward(None if upstream is None else upstream.cpu().double())
    if padding_idx is not None:
        leaves[1].grad[padding_idx] = 0
    return loss.detach(), [None if t is None else t.grad for t in leaves]


def expected_heads(hidden, weight, target, bias, head_weight):
    losses, gradients = zip(
        *(expected(h, weight, target, bias, upstream=u) for h, u in zip(hidden, head_weight, strict=True)), strict=True
    )
    dh, dw, db = zip(*gradients, strict=True)
    return torch.stack(losses), [torch.stack(dh), sum(dw), sum(db)]


def assert_close(loss, leaves, true_loss, true_gradients, tolerance):
    assert relative_error(loss, true_loss) <= tolerance
    scale = max(g.norm().item() for g in true_gradients if g is not None)
    for leaf, true in zip(leaves, true_gradients, strict=True):
        if leaf is None:
            continue
        assert leaf.grad.dtype == leaf.dtype
        if true.norm() > 1e-9 * scale:
            assert relative_error(leaf.grad, true) <= tolerance
        else:  # one class: the gradient is a difference that cancels
            assert leaf.grad.norm().item() <= tolerance
