"""What an operation returns as a gradient belongs to its receiver, who may add to it or scale it in place."""

from itertools import combinations

import pytest
import torch

import repdeg_fast
from repdeg_fast import (
    admin_norm,
    contrastive_loss,
    cosine_regularization,
    gradient_reversal,
    gumbel_mix,
    linear_cross_entropy,
    mlm_losses_and_sample,
    multi_layer_mlm_loss,
    pairwise_cosine,
    pairwise_max_cosine,
    span_pair_loss,
)

M, K, V, D = 6, 3, 11, 8
TARGET = torch.arange(M)


def _head(**more):
    """Operands of a linear layer onto the vocabulary."""
    return {"hidden_states": torch.randn(M, D), "weight": torch.randn(V, D), "bias": torch.randn(V), **more}


def _heads(**more):
    return _head(hidden_states=torch.randn(K, M, D), **more)


def _rows(*names):
    """Two activations, and parameters of a row."""
    return {"x": torch.randn(M, D), "branch": torch.randn(M, D), **{name: torch.rand(D) + 0.5 for name in names}}


def _pairs():
    return {"queries": torch.randn(M, D), "documents": torch.randn(2 * M, D)}


def _mixture(**more):
    return _heads(mixture_logits=torch.randn(M, K), embedding=torch.randn(V, D), **more)


def _one_set():
    return {"x": torch.randn(V, D)}


def _two_sets():
    return {"x": torch.randn(V, D), "y": torch.randn(M, D)}


def _case(function, make, **options):
    name = " ".join([function.__name__, *(f"{k}={v}" for k, v in options.items() if k not in ("target", "seed"))])
    return pytest.param(lambda **tensors: function(**tensors, **options), make, id=name)


CASES = [
    _case(admin_norm, _rows),
    _case(admin_norm, _rows, save="input", norm="rms"),
    _case(admin_norm, lambda: _rows("omega", "weight", "bias", "branch_bias"), norm="layer"),
    _case(admin_norm, lambda: _rows("weight", "bias", "branch_bias"), dropout=0.3, seed=1),
    *(_case(contrastive_loss, _pairs, reduction=r) for r in ("mean", "none")),
    _case(span_pair_loss, lambda: {"x": torch.randn(M, D)}),
    _case(cosine_regularization, lambda: {"weight": torch.randn(V, D)}),
    _case(gradient_reversal, lambda: {"x": torch.randn(M, D)}, scale=1.0),
    *(_case(linear_cross_entropy, _head, target=TARGET, strategy=s) for s in ("chunked", "streaming")),
    _case(linear_cross_entropy, _head, target=TARGET, reduction="none"),
    _case(linear_cross_entropy, _head, target=TARGET, return_lse=True),
    *(_case(multi_layer_mlm_loss, _heads, target=TARGET, strategy=s) for s in ("chunked", "streaming")),
    *(_case(mlm_losses_and_sample, _mixture, target=TARGET, seed=1, strategy=s) for s in ("chunked", "streaming")),
    *(_case(gumbel_mix, _mixture, seed=1, hard=hard) for hard in (True, False)),
    *(_case(pairwise_cosine, make, kind=kind) for make in (_one_set, _two_sets) for kind in ("mean", "square", "abs")),
    *(_case(pairwise_max_cosine, make) for make in (_one_set, _two_sets)),
]


def _bytes(tensor):
    """From where to where in memory it lies."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


@pytest.mark.parametrize(("function", "make"), CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_two_share_memory(backend, function, make):
    """Nor do the gradients of two backward passes, nor one with the upstream gradient, an operand or a result."""
    leaves = {name: tensor.requires_grad_() for name, tensor in make().items()}
    with repdeg_fast.use_backend(backend):
        outputs = function(**leaves)
    outputs = [t for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if t.requires_grad]
    upstream = [torch.randn_like(output) for output in outputs]
    tensors = {**leaves, **{f"output {i}": t for i, t in enumerate(outputs)}}
    tensors |= {f"upstream {i}": t for i, t in enumerate(upstream)}
    for run in (1, 2):
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, retain_graph=True, allow_unused=True)
        made = {f"gradient {run} of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
        assert made
        tensors |= made
    for (name, one), (other, another) in combinations(tensors.items(), 2):
        if "gradient" not in other:  # gradient_reversal's result is a view of its operand, as it should be
            continue
        (start, end), (other_start, other_end) = _bytes(one), _bytes(another)
        assert end <= other_start or other_end <= start, f"{name} and {other}"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_steps_accumulate_into_leaves(backend):
    """PyTorch takes a gradient without a copy as the ``.grad`` of a leaf and adds the next one to it in place."""
    x, branch = (torch.randn(2, M, D, requires_grad=True) for _ in range(2))
    upstream = torch.randn(2, M, D)
    with repdeg_fast.use_backend(backend):
        once = torch.autograd.grad(admin_norm(x, branch), [x, branch], upstream)
        for _ in range(2):
            admin_norm(x, branch).backward(upstream)
    for leaf, gradient in zip((x, branch), once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)
    norm = torch.nn.utils.clip_grad_norm_([x, branch], 1.0)
    torch.testing.assert_close(x.grad, 2 * once[0] / norm)
