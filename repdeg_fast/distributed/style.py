"""A model's vocabulary on a mesh in one line: every head that projects on it, and the words that are tied to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from repdeg_fast.distributed.shards import VocabularyShard, local_rows, part_here, shard_of
from repdeg_fast.nn import MultiLayerMLMHead


class VocabularyParallel(ParallelStyle):
    """Cut the vocabulary of a model over the ranks of a mesh: its heads (:class:`~repdeg_fast.MultiLayerMLMHead`, and
    those of Hugging Face models after ``huggingface.apply``), their biases, and the embeddings tied to them.

    Example::

        mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh["tp"], VocabularyParallel())

    Ranks have the same batch, and everything else of the model whole. Losses are served over shards; embeddings and
    logits are made of what each rank has of them. Make the optimizer afterwards: the parameters are new ones.
    """

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh: expected one dimension, got {device_mesh.ndim}; choose one, as in mesh['tp']"
            )
        found = list(_projections(module))
        if not found:
            raise ValueError(
                "module: expected a MultiLayerMLMHead or a Hugging Face model after huggingface.apply in it, got "
                f"{type(module).__name__} without"
            )
        modules = [*module.modules(), *(owner for owner, _ in found)]
        for owner, bias in found:
            for parameter in (owner.weight, bias):
                if parameter is not None and not isinstance(parameter, DTensor):
                    _cut(parameter, modules, device_mesh)
        weights = {id(owner.weight) for owner, _ in found}
        for part in modules:
            if type(part) in _CUT and id(part.weight) in weights:
                _take_over(part)
        return module


class VocabularyEmbedding(nn.Embedding):
    """Rows come from the rank that has them."""

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        shard = shard_of(None, weight)
        mine, rows = shard.local(input)
        here = part_here(weight)
        if not shard.rows:
            values = here.sum() + here.new_zeros(*input.shape, self.embedding_dim)
        else:
            values = F.embedding(rows, here, shard.row_of(self.padding_idx))
        return _Sum.apply(torch.where(mine[..., None], values, 0), shard.group)


class VocabularyLinear(nn.Linear):
    """Logits of each rank's columns, gathered."""

    def forward(self, input: Tensor) -> Tensor:
        return vocabulary_logits(input, self.weight, self.bias)


_CUT: dict[type, type] = {nn.Embedding: VocabularyEmbedding, nn.Linear: VocabularyLinear}


def vocabulary_logits(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., V) on every rank, of a weight that is cut over ranks."""
    shard, local_bias = shard_of(None, weight), local_rows("bias", bias, weight)
    logits = F.linear(_Copy.apply(hidden_states, shard.group), part_here(weight), local_bias)
    gathered: Tensor = _Columns.apply(logits, shard)
    return gathered


def _projections(module: nn.Module) -> Iterator[tuple[Any, nn.Parameter | None]]:
    """Modules whose weight is a head's projection, and the head's bias."""
    fused: Any = sys.modules.get("repdeg_fast.integrations.huggingface.fused")  # else no model is of its classes
    for part in module.modules():
        if isinstance(part, MultiLayerMLMHead):
            (owner,) = part._tied
            if not isinstance(owner, nn.Module):
                raise TypeError(
                    "module: expected its MultiLayerMLMHead tied to an nn.Embedding, got one of a parameter"
                )
            yield owner, part.bias
        elif fused is not None and isinstance(part, fused.FusedModel):
            decoder: Any = part.get_output_embeddings()
            yield decoder, decoder.bias


def _cut(parameter: nn.Parameter, modules: list[nn.Module], mesh: Any) -> None:
    """In the place of ``parameter``, wherever it is, one that is cut. All ranks get what the first one has."""
    cut = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]), parameter.requires_grad)
    for module in modules:
        for name, other in list(module._parameters.items()):
            if other is parameter:
                module._parameters[name] = cut


def _take_over(module: nn.Module) -> None:
    """A class is exchanged, not a method: unlike that, it is copied and pickled like any module's."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            "module: expected an embedding without max_norm, whose rows are cut over ranks, got one with it"
        )
    module.__class__ = _CUT[type(module)]


class _Sum(torch.autograd.Function):
    """Over ranks; what depends on it is the same on all, its gradient too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        tensor = tensor.contiguous().clone()
        distributed.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Copy(torch.autograd.Function):
    """What each rank makes other columns of: its gradient is a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Columns(torch.autograd.Function):
    """The columns of all ranks side by side."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: VocabularyShard) -> Tensor:
        ctx.shard = shard
        whole = tensor.new_zeros(*tensor.shape[:-1], shard.whole)
        whole[..., shard.first : shard.last] = tensor
        distributed.all_reduce(whole, group=shard.group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[..., ctx.shard.first : ctx.shard.last].contiguous(), None
