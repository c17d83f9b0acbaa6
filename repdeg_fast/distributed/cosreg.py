"""CosReg of rows that lie on several ranks: s = Σ ŵ and what else R is made of in one all-reduce of d + 2 numbers, in
float64; all else is each rank's own. Mathematics: :mod:`repdeg_fast.reference.cosreg`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repdeg_fast import backends
from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast._checks import check_floating, check_positive, is_dtensor
from repdeg_fast.contracts.cosreg import Rows, Saved, Sums
from repdeg_fast.distributed.debug import check_same
from repdeg_fast.distributed.shards import (
    VocabularyShard,
    local_rows,
    on_device,
    part_here,
    shard_of,
    sharded_dimensions,
)
from repdeg_fast.ops.cosreg import operation


class Cut(NamedTuple):
    """Over which groups of ranks the rows are, one group after the other."""

    whole: int  # N
    groups: tuple[Any, ...]


@torch.compiler.disable
def cosine_regularization(
    weight: Tensor, row_weight: Tensor | None, eps: float, shard: VocabularyShard | None
) -> Tensor:
    """:func:`repdeg_fast.cosine_regularization` of rows on several ranks."""
    cut, rows = _rows_here(weight, row_weight, eps, shard)
    value: Tensor = _CosReg.apply(*rows, cut, backends.requested())
    return value


@torch.compiler.disable
def add_cosine_regularization_(
    weight: Tensor, coefficient: float, row_weight: Tensor | None, eps: float, shard: VocabularyShard | None
) -> Tensor:
    """:func:`repdeg_fast.add_cosine_regularization_` of rows on several ranks, whose ``grad`` there is."""
    cut, rows = _rows_here(weight.detach(), row_weight, eps, shard, coefficient=coefficient)
    grad = local_rows("weight.grad", weight.grad, weight)
    assert grad is not None
    value, rows, saved = _forward(rows, cut, backends.requested())
    if grad.shape[0]:
        kernels, scale = operation.kernels(backends.requested(), rows.weight, grad), torch.full_like(value, coefficient)
        with on_device(grad):
            kernels.backward(grad, scale, rows, saved, accumulate=True)
        torch.autograd.graph.increment_version(grad)
    return value


class _CosReg(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, row_weight: Tensor | None, eps: float, cut: Cut, backend: str) -> Tensor:
        value, rows, saved = _forward(Rows(weight, row_weight, eps), cut, backend)
        ctx.save_for_backward(weight, rows.row_weight, *saved)
        ctx.eps, ctx.backend = eps, backend
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        weight, row_weight, *saved = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        if weight.shape[0]:
            kernels, rows = operation.kernels(ctx.backend, weight), Rows(weight, row_weight, ctx.eps)
            with on_device(weight):
                kernels.backward(grad_weight, grad_value.contiguous(), rows, Saved(*saved), accumulate=False)
        return grad_weight, None, None, None, None


def _forward(rows: Rows, cut: Cut, backend: str) -> tuple[Tensor, Rows, Saved]:
    """R; the rows here and what their backward pass starts from, both with the largest row weight here as 1, as the
    operator of one device has them."""
    weight, row_weight, eps = rows
    (n, d), dtype = weight.shape, arithmetic_dtype(weight)
    numbers = weight.new_zeros(d + 2, dtype=torch.float64)
    inverse_norm, largest = weight.new_empty(0, dtype=dtype), numbers.new_ones(())
    if row_weight is not None and n:
        largest = row_weight.amax().clamp_min(0).double()
        largest = torch.where(largest == 0, 1, largest)
        row_weight = (row_weight / largest).to(dtype).contiguous()
    rows = Rows(weight, row_weight, eps)
    if n:
        with on_device(weight):
            sums = Sums(*operation.kernels(backend, weight).forward(rows))
        inverse_norm, total = sums.inverse_norm, sums.total_weight.double()
        numbers[:d] = sums.column_sum.double() * largest
        numbers[d] = _squares(sums, row_weight, eps) * largest**2
        numbers[d + 1] = total * largest
        if row_weight is not None:
            numbers[d + 1].masked_fill_((row_weight < 0).any(), torch.nan)
    for group in cut.groups:
        distributed.all_reduce(numbers, group=group)
    column_sum, squares, total = numbers[:d], numbers[d], numbers[d + 1]
    if row_weight is not None and weight.device.type == "cpu" and not total > 0:
        raise ValueError("row_weight: expected no negative value on any rank, and a positive sum over all of them")
    value = ((column_sum.square().sum() - squares) / total**2).to(dtype)
    return value, rows, Saved((column_sum / largest).to(dtype), inverse_norm, (total / largest).to(dtype))


def _squares(sums: Sums, row_weight: Tensor | None, eps: float) -> Tensor:
    """Σ p²‖ŵ‖² of the rows here. ‖ŵ‖ is 0 or 1 except for rows shorter than eps: where there are such, what R of the
    rows here leaves is taken, although it is rounded at the size of ‖s‖²."""
    weights = torch.ones_like(sums.inverse_norm) if row_weight is None else row_weight
    counted = torch.where(sums.inverse_norm == 0, 0, weights.double().square()).sum()
    left = sums.column_sum.double().square().sum() - sums.value.double() * sums.total_weight.double() ** 2
    return torch.where((sums.inverse_norm >= 1 / eps).any(), left, counted)


def _rows_here(
    weight: Tensor, row_weight: Tensor | None, eps: float, shard: VocabularyShard | None, **others: Any
) -> tuple[Cut, Rows]:
    """Arguments checked; of a DTensor the local part, with a gradient."""
    if is_dtensor(weight) and shard is None:
        mesh = weight.device_mesh  # type: ignore[attr-defined]
        groups = tuple(mesh.get_group(i) for i in sharded_dimensions(weight, "weight"))  # type: ignore[arg-type]
        cut, here = Cut(weight.shape[0], groups), part_here(weight)
    else:
        shard = shard_of(shard, weight)
        cut, here = Cut(shard.whole, (shard.group,)), weight
    check_floating("weight", here)
    if here.dim() != 2 or cut.whole == 0 or here.shape[1] == 0:
        raise ValueError(f"weight: expected (N, d), at least one row and one column, got shape {tuple(weight.shape)}")
    check_positive("eps", eps)
    row_weight = local_rows("row_weight", row_weight, weight)
    if row_weight is not None:
        check_floating("row_weight", row_weight)
        if row_weight.shape != here.shape[:1] or row_weight.device != here.device:
            raise ValueError(
                f"row_weight: expected shape ({here.shape[0]},), one value a row of weight here, on {here.device}, "
                f"got {tuple(row_weight.shape)} on {row_weight.device}"
            )
        if row_weight.requires_grad:
            raise ValueError("row_weight: gets no gradient; pass row_weight.detach()")
    for group in cut.groups:
        check_same(
            group, "cosine_regularization", rows=cut.whole, width=here.shape[1], dtype=here.dtype, eps=eps,
            weighted=row_weight is not None, **others,
        )  # fmt: skip
    return cut, Rows(here, row_weight, eps)
