"""The linear cross entropy over a vocabulary that is cut."""

import torch
from process_pool import Traffic

import repdeg_fast
from repdeg_fast import linear_cross_entropy, multi_layer_mlm_loss
from repdeg_fast.distributed import linear_cross_entropy as over_shards

from .support import WIDTH, Cut, close, same_everywhere


def cross_entropy(rank, form, heads, options, dtype, whole, backend):
    """Values and gradients of hidden states, weight and bias."""
    positions, bias = 9, options.pop("bias", True)
    hidden = (3 * torch.randn(heads, positions, WIDTH)).to(dtype).requires_grad_()
    weight = torch.randn(whole, WIDTH).to(dtype).requires_grad_()
    bias = torch.randn(whole).to(dtype).requires_grad_() if bias else None
    target = torch.randint(whole, (positions,))
    target[3] = -100
    upstream = torch.rand(heads, positions if options.get("reduction") == "none" else 1)
    return_lse = options.pop("return_lse", False)
    over_shards.SMALLEST = options.pop("smallest", 1 << 20)  # of a piece of rows

    def run(hidden, weight, bias, **more):
        if return_lse:
            loss, lse = linear_cross_entropy(hidden[0], weight, target, bias, return_lse=True, **options, **more)
            return loss + lse.square().mean()
        losses = multi_layer_mlm_loss(hidden, weight, target, bias, **options, **more)
        return (
            (losses * upstream.squeeze()).sum()
            if options.get("reduction") == "none"
            else (losses * upstream[:, 0]).sum()
        )

    with repdeg_fast.use_backend(backend):
        expected = run(hidden, weight, bias)
        expected.backward()
        cut = Cut(form, whole)
        parts = [cut.take(weight), cut.take(bias)]
        mine = hidden.detach().requires_grad_()
        with Traffic() as forward:
            value = run(mine, *parts, shard=cut.shard)
        with Traffic() as backward:
            value.backward()
    assert forward.bytes() <= 12 * heads * positions * (2 if dtype == torch.float64 else 1)
    assert backward.bytes() == hidden.nbytes
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    close(value, expected, tolerance)
    same_everywhere(value)
    same_everywhere(mine.grad)
    close(mine.grad, hidden.grad, tolerance)
    close(cut.gradient(parts[0]), weight.grad, tolerance)
    if bias is not None:
        close(cut.gradient(parts[1]), bias.grad, tolerance)


def cross_entropy_options(rank, form, heads, options, dtype, whole, backend):
    """What is served beside: every number of one process, classes with equal logits included."""
    positions, options = 10, dict(options)
    hidden = torch.randint(-2, 3, (heads, positions, WIDTH)).to(dtype).requires_grad_()
    rows = torch.randint(-4, 5, (whole, WIDTH)) / 8  # small integers are multiplied and added up without rounding
    rows[whole // 2 :] = rows[: whole - whole // 2].clone()  # each logit twice, on other ranks
    weight, bias = rows.to(dtype).requires_grad_(), torch.zeros(whole).to(dtype).requires_grad_()
    target = torch.randint(whole, (positions,))
    target[3] = -100
    with torch.no_grad():
        best = (hidden[0] @ weight.T).float().argmax(dim=1)
    target[5:] = best[5:]
    each = torch.rand(whole) + 0.1 if options.pop("weighted", False) else None
    told = {"return_predictions": True, "return_accuracy": True, "return_z_loss": True}
    if options.pop("plain", False):
        told = {}

    def run(hidden, weight, bias, **more):
        if heads == 1:
            asked = {"return_lse": True, **told, **options, "class_weight": each, **more}
            found = linear_cross_entropy(hidden.view(2, -1, WIDTH), weight, target.view(2, -1), bias, **asked)
            return (found, found[0].sum() + found[1].tanh().sum())
        found = multi_layer_mlm_loss(hidden, weight, target, bias, class_weight=each, **told, **options, **more)
        loss = found.loss if told else found
        return found, (loss.float() * torch.arange(1.0, heads + 1).view(-1, *[1] * (loss.dim() - 1))).sum()

    with repdeg_fast.use_backend(backend):
        expected, total = run(hidden, weight, bias, strategy="streaming")
        total.backward()
        cut = Cut(form, whole)
        parts = [cut.take(weight), cut.take(bias)]
        mine = hidden.detach().requires_grad_()
        with Traffic() as traffic:
            found, value = run(mine, *parts, shard=cut.shard)
        value.backward()
    size = 8 if dtype == torch.float64 else 4
    assert traffic.bytes() <= heads * positions * (3 * size + (size + 8 if told else 0))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    for name in found._fields if told else ():
        got, right = getattr(found, name), getattr(expected, name)
        assert (got is None) == (right is None)
        if name in ("predictions", "accuracy"):
            assert torch.equal(got, right), name
        elif got is not None:
            close(got, right, tolerance)
    close(value, total, tolerance)
    same_everywhere(mine.grad)
    close(mine.grad, hidden.grad, tolerance)
    close(cut.gradient(parts[0]), weight.grad, tolerance)
    close(cut.gradient(parts[1]), bias.grad, tolerance)
