"""Which rows of a vocabulary a rank has, and how a call says so: by DTensors, or by a process group and a range."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from repdeg_fast import _ranks
from repdeg_fast._checks import check_integer, is_dtensor

# FSDP2 over a mesh that has another sharded dimension cuts rows in another order: still rows.
_ROWS: tuple[type, ...] = tuple(
    kind
    for name in ("Shard", "_StridedShard")
    if (kind := getattr(torch.distributed.tensor.placement_types, name, None))
)


@dataclass(frozen=True)
class VocabularyShard:
    """Rows [first, last) of a vocabulary of ``whole`` rows, of which this rank has them and nobody else in ``group``.

    Made on all ranks of the group at once: they compare their ranges, so that a mistake is the same error on each.
    Shards may be of any size, none included; their order is that of the ranks.

    Example, under ``torchrun --nproc-per-node 4``::

        shard = VocabularyShard.even(50_257)
        mine = weight[shard.first : shard.last]
        loss = linear_cross_entropy(hidden_states, mine, target, shard=shard)

    Args:
        first, last: the range.
        whole: V.
        group: of ``torch.distributed``; all ranks unless given.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: on every rank: ranges that overlap or leave gaps, ranks with another ``whole``; a rank outside of
            the group.
    """

    first: int
    last: int
    whole: int
    group: Any = None

    def __post_init__(self) -> None:
        for name in ("first", "last", "whole"):
            check_integer(name, getattr(self, name))
        check_group(self.group)
        _check_ranges(gathered((self.first, self.last, self.whole), self.group))

    @property
    def rows(self) -> int:
        return self.last - self.first

    @classmethod
    def even(cls, whole: int, group: Any = None) -> VocabularyShard:
        """Cut as ``torch.chunk`` and DTensors cut: ⌈V/n⌉ rows a rank, the last ones fewer."""
        check_integer("whole", whole)
        check_group(group)
        return cls(*_range(whole, distributed.get_rank(group), distributed.get_world_size(group)), whole, group)

    @classmethod
    def of_mesh(cls, mesh: Any, dimension: str, whole: int) -> VocabularyShard:
        """:meth:`even` over a named dimension of a device mesh."""
        return cls.even(whole, mesh_group(mesh, dimension))

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of token ids: which ones are rows here, and their rows (0 for the others)."""
        mine = (ids >= self.first) & (ids < self.last)
        return mine, torch.where(mine, ids - self.first, 0)

    def row_of(self, token: int | None) -> int | None:
        """Which row here is a token's; ``None``: none."""
        return None if token is None or not self.first <= token < self.last else token - self.first


def check_group(group: Any) -> None:
    """There is a process group, and this rank is in it."""
    if not _ranks.are_there():
        raise RuntimeError(
            "group: expected an initialized process group, got none; start with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    _ranks.number(group)


def mesh_group(mesh: Any, dimension: str) -> Any:
    """The process group of a named dimension of a mesh."""
    names = mesh.mesh_dim_names or ()
    if dimension not in names:
        there = ", ".join(map(repr, names)) or "none that is named"
        raise ValueError(f"dimension: expected one of the mesh's ({there}), got {dimension!r}")
    return mesh.get_group(dimension)


def shard_of(shard: VocabularyShard | None, weight: Tensor, name: str = "weight") -> VocabularyShard:
    """What the rows of ``weight`` (V, d) here are of the whole."""
    if not is_dtensor(weight):
        if not isinstance(shard, VocabularyShard):
            raise TypeError(f"shard: expected a VocabularyShard, got {type(shard).__name__}")
        if weight.dim() != 2 or weight.shape[0] != shard.rows:
            raise ValueError(
                f"{name}: expected {shard.rows} rows, those of shard [{shard.first}, {shard.last}), got shape "
                f"{tuple(weight.shape)}"
            )
        return shard
    if shard is not None:
        raise ValueError(f"shard: expected None beside a {name} that is a DTensor, which says what it is itself")
    assert isinstance(weight, DTensor)
    if _is_of_fsdp(weight):
        raise ValueError(
            f"{name}: expected rows over ranks that have the same batch, got a parameter that fully_shard has cut "
            "(FSDP2), whose ranks have batches of their own; call this inside the forward pass of the module that was "
            f"given to fully_shard, where {name} is whole"
        )
    dimensions = sharded_dimensions(weight, name)
    if len(dimensions) != 1:
        raise ValueError(
            f"{name}: expected rows over one dimension of the mesh, Shard(0), got {_shown(weight)}; "
            f"redistribute it, or pass {name}.full_tensor()"
        )
    (dimension,), mesh, whole = dimensions, weight.device_mesh, weight.shape[0]
    first, last = _range(whole, mesh.get_local_rank(dimension), mesh.size(dimension))
    if weight._local_tensor.shape[0] != last - first:
        raise ValueError(
            f"{name}: expected {last - first} rows on this rank, as DTensors cut {whole}, got "
            f"{weight._local_tensor.shape[0]}; pass the local tensor with shard=VocabularyShard(first, last, whole)"
        )
    return _known(first, last, whole, mesh.get_group(dimension))


def _is_of_fsdp(weight: DTensor) -> bool:
    """Nothing in a parameter says that ``fully_shard`` has cut it: torch's states of modules do, which are not public.
    Where a version has none of these names, nothing is found."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for state in [reference() for reference in states.values()]:
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.13
            groups = [getattr(state, "_fsdp_param_group", None)]
        if any(weight is one.sharded_param for group in groups if group is not None for one in group.fsdp_params):
            return True
    return False


def sharded_dimensions(weight: DTensor, name: str) -> list[int]:
    """The dimensions of its mesh that cut the rows of a DTensor; all others have copies."""
    for placement in weight.placements:
        if not (isinstance(placement, Replicate) or (isinstance(placement, _ROWS) and placement.dim == 0)):  # type: ignore[attr-defined]
            raise ValueError(
                f"{name}: expected rows over ranks, Shard(0), or copies, Replicate(), got {_shown(weight)}; "
                f"{name}.redistribute(placements=[Shard(0)]) cuts it that way"
            )
    return [i for i, placement in enumerate(weight.placements) if isinstance(placement, _ROWS)]


def local_rows(name: str, tensor: Tensor | None, weight: Tensor) -> Tensor | None:
    """The part here of what has a value or a row for each row of ``weight``, with a gradient; cut like it."""
    if tensor is None:
        return None
    if is_dtensor(tensor) != is_dtensor(weight):
        wanted, got = ("a DTensor", "a plain tensor") if is_dtensor(weight) else ("a plain tensor", "a DTensor")
        raise TypeError(f"{name}: expected {wanted} like weight, got {got}")
    if isinstance(tensor, DTensor) and isinstance(weight, DTensor):
        if tensor.placements != weight.placements or tensor.device_mesh != weight.device_mesh:
            raise ValueError(f"{name}: expected {_shown(weight)} like weight, got {_shown(tensor)}")
        return part_here(tensor)
    return tensor


def part_here(tensor: Any) -> Tensor:
    """What this rank has of a DTensor, with a gradient; a plain tensor as it is."""
    return waited(tensor.to_local()) if is_dtensor(tensor) else tensor


def whole_here(name: str, tensor: Any) -> Any:
    """What every rank has whole: a plain tensor, or the local one of a DTensor that is replicated."""
    if isinstance(tensor, (list, tuple)):
        return [whole_here(f"{name}[{i}]", part) for i, part in enumerate(tensor)]
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(isinstance(placement, Replicate) for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected the same on all ranks, Replicate(), got {_shown(tensor)}; "
            f"{name}.redistribute(placements=[Replicate()]) gathers it"
        )
    return part_here(tensor)


def like(result: Tensor, given: Any) -> Tensor:
    """``result``, which all ranks have, as a DTensor where what was ``given`` is one."""
    given = given[0] if isinstance(given, (list, tuple)) and given else given
    if not isinstance(given, DTensor):
        return result
    copies: Sequence[Placement] = [Replicate()] * given.device_mesh.ndim
    return DTensor.from_local(result, given.device_mesh, copies, run_check=False)


def waited(tensor: Tensor) -> Tensor:
    """Not one that a collective still writes."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def gathered(value: Any, group: Any) -> list[Any]:
    """Of all ranks: a small object."""
    values = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def _range(whole: int, rank: int, ranks: int) -> tuple[int, int]:
    step = -(-whole // ranks)
    return min(rank * step, whole), min((rank + 1) * step, whole)


def _check_ranges(ranges: Sequence[tuple[int, int, int]]) -> None:
    """Each rank sees those of all: what is wrong is wrong on every rank."""
    wholes = [whole for _, _, whole in ranges]
    if len({*wholes}) > 1:
        raise ValueError(f"whole: expected the same vocabulary on all ranks, got {wholes} in their order")
    shown, end = ", ".join(f"[{first}, {last})" for first, last, _ in ranges), 0
    for rank, (first, last, _) in enumerate(ranges):
        if first != end or last < first:
            problem = "overlaps what is before" if first < end else "leaves a gap" if first > end else "ends too early"
            raise ValueError(
                f"first, last: expected ranges that follow one another from 0 to {wholes[0]}, got {shown}: that of "
                f"rank {rank} {problem}"
            )
        end = last
    if end != wholes[0]:
        raise ValueError(f"last: expected ranges that end at {wholes[0]}, got {shown}")


def _known(first: int, last: int, whole: int, group: Any) -> VocabularyShard:
    """What a DTensor says, whose ranks need not compare."""
    shard = object.__new__(VocabularyShard)
    for name, value in {"first": first, "last": last, "whole": whole, "group": group}.items():
        object.__setattr__(shard, name, value)
    return shard


def _shown(tensor: DTensor) -> str:
    placements = ", ".join(f"Shard({p.dim})" if isinstance(p, Shard) else repr(p) for p in tensor.placements)
    return f"a DTensor [{placements}] on {tensor.device_mesh.ndim} mesh dimension(s)"
