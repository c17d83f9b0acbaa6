"""torch.func.grad of operations beyond its cells in docs/compilers.md: compiled, and with other modes around it."""

from functools import partial

import pytest
import torch
from subjects import M, Subject, assert_alike, total

import repdeg_fast

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("row", ["admin_norm", "linear_cross_entropy", "pairwise_cosine"])
def test_a_compiled_functional_gradient(row):
    """The compiler does not say inside which tensors want one."""
    subject = Subject(row)
    tensors = [t.detach() for t in subject.make(M)]
    torch._dynamo.reset()
    gradient = torch.func.grad(lambda *t: total(subject.function(*t)), argnums=tuple(range(len(tensors))))
    assert_alike(torch.compile(gradient, backend="aot_eager", fullgraph=True)(*tensors), gradient(*tensors))


@pytest.mark.parametrize("compiler", [lambda f: f, partial(torch.compile, backend="aot_eager", fullgraph=True)])
def test_a_functional_gradient_does_not_take_a_weight_for_recoverable(compiler):
    """What a transform wraps cannot be looked at: here the output does not tell the normalized value."""
    x, branch, weight = torch.randn(M, 8), torch.randn(M, 8), torch.zeros(8)
    torch._dynamo.reset()
    norm = lambda w: total(repdeg_fast.admin_norm(x, branch, weight=w, bias=torch.ones(8)))  # noqa: E731
    leaf = weight.clone().requires_grad_()
    normalized = torch.nn.functional.layer_norm(x + branch, (8,), leaf, torch.ones(8))
    assert_alike([compiler(torch.func.grad(norm))(weight)], torch.autograd.grad(total(normalized), leaf), 1e-5)


def test_transforms_around_a_functional_gradient():
    """Plain autograd sees what a transform inside it does not differentiate; modes other than the transform's hold."""
    subject = Subject("linear_cross_entropy")
    hidden, weight, bias = subject.make(M)
    value_of = lambda h: total(subject.function(h, weight, bias))  # noqa: E731
    _, value = torch.func.grad_and_value(value_of)(hidden.detach())
    found, expected = (torch.autograd.grad(v, (weight, bias)) for v in (value, value_of(hidden)))
    assert_alike(found, expected)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.func.grad(value_of)(hidden.detach()).sum().backward()
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no forward-mode derivative"):
        torch.func.hessian(value_of)(hidden.detach())

    def constant(h):
        with torch.no_grad():
            value = subject.function(h, weight, bias)
        return value * h.sum()

    value = subject.function(hidden, weight, bias)
    assert_alike([torch.func.grad(constant)(hidden.detach())], [value.expand_as(hidden)])
