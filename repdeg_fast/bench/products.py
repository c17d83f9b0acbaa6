"""The floor under operations that are made of large matrix products: the products alone, into memory that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor, Tensor]  # a, b, and where a @ b goes


def prepare(leaf: Tensor, forward: Sequence[Product], backward: Sequence[Product]) -> Callable[[], Tensor]:
    """What a :class:`~repdeg_fast.bench.suite.Provider` prepares; ``leaf`` is any input that requires a gradient."""
    return lambda: _Products.apply(leaf, forward, backward)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, forward: Sequence[Product], backward: Sequence[Product]) -> Tensor:
        ctx.backward_products = backward
        _multiply(forward)
        return leaf.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        _multiply(ctx.backward_products)
        return None, None, None


def _multiply(products: Sequence[Product]) -> None:
    for a, b, out in products:
        torch.mm(a, b, out=out)


def new_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialized (rows, columns) matrix whose rows start on cache lines, where products are fastest."""
    line = 64 // like.element_size()
    return like.new_empty(rows, -(-columns // line) * line)[:, :columns]
