"""CosReg of a vocabulary that is cut."""

import torch
from process_pool import Traffic
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import repdeg_fast
from repdeg_fast import add_cosine_regularization_, cosine_regularization

from .support import WIDTH, Cut, close, mesh, same_everywhere


def cosreg(rank, form, weighted, dtype, whole, backend):
    weight = torch.randn(whole, WIDTH, dtype=dtype) + 1
    weight[min(2, whole - 1)] = 0
    weight[0] *= 1e-14
    weight.requires_grad_()
    row_weight = torch.rand(whole) * 1e30 if weighted else None
    with repdeg_fast.use_backend(backend):
        expected = cosine_regularization(weight, row_weight=row_weight)
        expected.backward()
        cut = Cut(form, whole)
        part, its_weight = cut.take(weight), cut.take(row_weight)
        with Traffic() as traffic:
            value = cosine_regularization(part, row_weight=its_weight, shard=cut.shard)
            value.backward()
        assert traffic.bytes() <= 8 * (WIDTH + 2)
        added = part.detach().requires_grad_()
        added.grad = torch.ones_like(added)
        again = add_cosine_regularization_(added, 2.0, row_weight=its_weight, shard=cut.shard)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close(value, expected, tolerance)
    close(again, expected, tolerance)
    same_everywhere(value)
    close(cut.gradient(part), weight.grad, tolerance)
    close(cut.gradient(added), 1 + 2 * weight.grad, tolerance)


def cosreg_of_two_dimensions(rank):
    """FSDP2 over both dimensions of a mesh, over one with copies on the other."""
    weight = torch.randn(7, WIDTH)
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        part = nn.Parameter(distribute_tensor(weight, mesh((2, 2), ("dp", "tp")), placements))
        part.grad = torch.zeros_like(part)
        close(add_cosine_regularization_(part, 1.0), cosine_regularization(weight))
        whole = weight.clone().requires_grad_()
        cosine_regularization(whole).backward()
        close(part.grad.full_tensor(), whole.grad)
