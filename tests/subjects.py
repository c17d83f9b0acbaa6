"""Public operations and modules (rows of tests/support.py) as functions that tests call, compile and compare."""

from contextlib import contextmanager
from functools import partial

import support
import torch
from helpers import relative_error

M, NUMBER, SEED = 6, 0.25, 5


class Subject:
    """A row of a table as a function of tensors, of which those that want gradients are the leaves."""

    def __init__(self, row):
        self.row = row
        if row in support.OPERATIONS:
            case = support.OPERATIONS[row]
            self.module, self.make = None, case.tensors
            self.function = lambda *tensors, number=NUMBER, seed=SEED: case.function(*tensors, number, seed)
            self.seeded = case.seeded
        else:
            case, self.seeded = support.MODULES[row], False
            self.module, self.make = case.make(), case.inputs
            self.function = self.module.__call__
        self.coefficient = case.coefficient

    def pure(self, parameters, *tensors):
        """The function, of parameters too."""
        return torch.func.functional_call(self.module, parameters, tensors) if self.module else self.function(*tensors)

    def with_number(self, number):
        """From the function, compiled or not, to the one with another coefficient."""
        if not self.module:
            return lambda function: partial(function, number=number)
        owner, _, name = self.coefficient.rpartition(".")
        setattr(self.module.get_submodule(owner), name, number)
        return lambda function: function

    def results(self, function, tensors):
        """Values, then gradients of the tensors and parameters that want some."""
        leaves = [*tensors, *(self.module.parameters() if self.module else ())]
        for leaf in leaves:
            leaf.grad = None
        outputs = as_tuple(function(*tensors))
        if any(output.requires_grad for output in outputs):
            total(outputs).backward()  # torch.autograd.grad does not go with reentrant checkpoints
        return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def total(outputs):
    """A number that depends on each value in another way, more than once."""
    return sum(
        (o.float() * torch.linspace(1, 2, o.numel(), device=o.device).view_as(o)).square().sum()
        for o in as_tuple(outputs)
        if o.requires_grad
    )


def assert_alike(found, expected, tolerance=1e-6):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) <= tolerance


def compiled(subject, dynamic, backend="aot_eager", whole=True):
    """``whole``: a module, too, is one graph; else those of its modules that are ours are."""
    torch._dynamo.reset()  # all rows are one function to it, which it compiles a few times at most
    function = (whole and subject.module) or subject.function
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


@contextmanager
def in_the_same_graph():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
