"""What all cases are made of: a vocabulary that is cut, and comparisons."""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from repdeg_fast.distributed import VocabularyShard

WIDTH = 12


def mesh(shape=None, names=("tp",)):
    return init_device_mesh("cpu", shape or (distributed.get_world_size(),), mesh_dim_names=names)


def uneven(whole, ranks):
    """Ends of ranges: the first rank has one row, the last but one none, if there are enough."""
    ends = [0, *(min(whole, 1 + 3 * i) for i in range(ranks - 1)), whole]
    if ranks > 2:
        ends[-2] = ends[-3]
    return ends


class Cut:
    """A matrix (V, d), or vector (V,), as each rank of a vocabulary-parallel call has it, and its gradient whole."""

    def __init__(self, form, whole):
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
        self.form, self.whole, self.shard = form, whole, None
        if form == "dtensor":
            self.mesh = mesh()
        else:
            ends = uneven(whole, ranks)
            self.shard = VocabularyShard(ends[rank], ends[rank + 1], whole)

    def take(self, tensor):
        if tensor is None:
            return None
        if self.form == "dtensor":
            part = distribute_tensor(tensor.detach(), self.mesh, [Shard(0)])
        else:
            part = tensor.detach()[self.shard.first : self.shard.last].clone()
        return part.requires_grad_(tensor.requires_grad)

    def gradient(self, part):
        if self.form == "dtensor":
            return part.grad.full_tensor()
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, part.grad)
        return torch.cat(parts)


def close(got, expected, tolerance=1e-5):
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape
    error, size = (got - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * (size or 1), f"off by {error / (size or 1):.2g}"


def same_everywhere(tensor):
    parts = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, tensor.detach())
    for part in parts:
        assert torch.equal(part, parts[0])


def raised(function):
    """Type and text of what a call raises, for the test to look at on every rank."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None
