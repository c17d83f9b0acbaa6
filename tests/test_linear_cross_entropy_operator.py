"""Linear cross entropy as PyTorch sees it: operator checks, compilation, derivatives."""

import pytest
import torch
from helpers import relative_error
from linear_cross_entropy_cases import STRATEGIES, expected, inputs

import repdeg_fast
from repdeg_fast import linear_cross_entropy, mlm_losses_and_sample, multi_layer_mlm_loss
from repdeg_fast.ops import chunked_logits, native_linear_cross_entropy
from repdeg_fast.ops import linear_cross_entropy as ops


@pytest.mark.parametrize("chunked", [False, True])
def test_opcheck(chunked):
    hidden, weight, target, bias = inputs(9, 6, 5, torch.float64)
    class_weight = torch.rand(9).double()
    options = (class_weight, -100, 0.1, 0.0, 0.0, 1, 1e-3, "mean", None, torch.float64, [True, True, True])
    arguments = (hidden, weight, target, bias, *options, True, chunked, "auto")
    torch.library.opcheck(ops.linear_cross_entropy.overload, arguments)
    made = [t.detach().clone() for t in (hidden, weight, bias)]
    grad_loss, inputs_ = torch.tensor([0.5]).double(), (hidden.detach(), weight.detach(), target, bias.detach())
    torch.library.opcheck(ops.linear_cross_entropy_rescale_.overload, (*made, grad_loss, *inputs_, *options, "auto"))
    torch.library.opcheck(
        ops.linear_cross_entropy_backward.overload, (grad_loss, None, *inputs_, None, *options, "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_as_one_graph(strategy):
    hidden, weight, target, bias = inputs(40, 16, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, bias):
        return 2 * linear_cross_entropy(hidden.tanh(), weight, target, bias, strategy=strategy)

    step(hidden, weight, bias).backward()
    compiled = [t.grad for t in (hidden, weight, bias)]
    loss = 2 * linear_cross_entropy(hidden.tanh(), weight, target, bias)
    for ours, true in zip(compiled, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        assert relative_error(ours, true) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True}], ids=["plain", "rows"])
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_meta_tensors(strategy, options, dtype):
    """Shapes and dtypes without memory, as sizing a model needs them."""
    results = []
    for device in ("cpu", "meta"):
        hidden, weight, target, bias = inputs(9, 6, 5, dtype, device)
        outputs = linear_cross_entropy(hidden, weight, target, bias, strategy=strategy, **options)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        results.append([*(outputs if isinstance(outputs, tuple) else [loss]), *gradients])
    assert all(t.is_meta for t in results[1])
    assert [(t.shape, t.dtype) for t in results[0]] == [(t.shape, t.dtype) for t in results[1]]


def test_meta_tensors_of_several_heads():
    hidden, weight, target, bias = inputs(9, 6, 5, device="meta", heads=3)
    losses = multi_layer_mlm_loss(hidden, weight, target, bias)
    assert (losses.shape, losses.device.type) == ((3,), "meta")
    losses, tokens, embeddings = mlm_losses_and_sample(hidden, torch.empty(6, 3, device="meta"), weight, target, bias)
    assert (losses.shape, tokens.shape, embeddings.shape) == ((3,), (6,), (6, 5))
    (losses.sum() + embeddings.sum()).backward()
    assert (hidden.grad.shape, weight.grad.shape, bias.grad.shape) == (hidden.shape, weight.shape, bias.shape)


def test_second_derivative_is_a_clear_error():
    for strategy in STRATEGIES:
        hidden, weight, target, _ = inputs(9, 6, 5)
        loss = linear_cross_entropy(hidden, weight, target, strategy=strategy)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_no_gradient_is_made_where_none_is_needed(monkeypatch):
    made = []
    matrix = chunked_logits._gradients
    monkeypatch.setattr(chunked_logits, "_gradients", lambda *a: made.append(matrix(*a)) or made[-1])
    monkeypatch.setattr(native_linear_cross_entropy, "SMALL", 0)
    hidden, weight, target, bias = inputs(30, 10, 8)
    with torch.no_grad(), repdeg_fast.use_backend("cpu"):
        loss = linear_cross_entropy(hidden, weight, target, bias, strategy="chunked")
    assert relative_error(loss, expected(hidden, weight, target, bias)[0]) <= 1e-5
    assert made == [(None, None, None)]
