"""The table of determinism in docs/compilers.md: runs, threads, and rows among others."""

import pytest
import support
import torch
from helpers import relative_error
from subjects import Subject, assert_alike

pytestmark = pytest.mark.usefixtures("one_thread")


def all_equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("row", support.DETERMINISM)
def test_the_same_bits(row, threads):
    """Twice, and with two threads."""
    subject, results = Subject(row), []
    tensors = subject.make(160)
    for number in (1, 1, 2, 2):
        threads(number)
        results.append(subject.results(subject.function, tensors))
    assert all_equal(results[0], results[1])
    assert all_equal(results[2], results[3])
    if support.DETERMINISM[row][1] == support.BITS:
        assert all_equal(results[0], results[2])
    else:
        assert_alike(results[0], results[2])


@pytest.mark.parametrize("row", support.ROWS)
def test_a_row_among_others(row):
    """The first rows alone: their results, and the gradients of what is theirs."""
    rows, promise = support.ROWS[row], support.DETERMINISM[row][2]
    tensors = [tensor.requires_grad_() for tensor in rows.tensors()]
    whole = rows.first(support._MANY, *tensors)
    for m in (1, 2, 7, 64):
        part = rows.first(m, *tensors)
        assert torch.equal(part, whole[:m]) if promise == support.BITS else relative_error(part, whole[:m]) <= 1e-6
        if promise == support.BITS:
            alone, among = (
                torch.autograd.grad(value[:m].sin().sum(), tensors, retain_graph=True) for value in (part, whole)
            )
            assert all_equal(alone, among)


def test_every_operation_says_how_it_repeats():
    assert set(support.DETERMINISM) == set(support.OPERATIONS)
    of_rows = {row for row, (_, _, batch) in support.DETERMINISM.items() if batch != support.NONE}
    assert set(support.ROWS) == of_rows
