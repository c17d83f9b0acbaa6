"""Gradient caching: the gradients of a loss over a large batch with the activations of a small one (arXiv 2101.06983).

A contrastive loss needs the embeddings of the whole batch at once, but nothing else of it. So: encode chunk by chunk
without a graph; take the loss and its gradient in the embeddings; encode each chunk again, now with a graph, under the
random state that it had the first time, and put the gradient in. Losses that a chunk has of its own (coCondenser's
masked-language-model loss, arXiv 2108.05540) join in the second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from repdeg_fast import _ranks
from repdeg_fast._checks import check_finite, check_size


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of a chunk of n examples, where it has more than their embeddings."""

    embeddings: Tensor  # (n, d)
    loss: Tensor | None = None  # of the chunk alone, a mean ...
    count: Tensor | int = 1  # ... over so many things, e.g. masked tokens


class CachedLosses(NamedTuple):
    """Detached: the backward pass is done."""

    loss: Tensor  # of the embeddings + chunk_loss_weight · chunk_loss
    embedding_loss: Tensor
    chunk_loss: Tensor | None  # the mean over all that the chunks count, of all ranks in training; not over chunks


Encode = Callable[[Any], "Tensor | Encoded"]


def cached_backward(
    encode: Encode | Sequence[Encode],
    loss_fn: Callable[..., Tensor],
    *batches: Any,
    chunk_size: int,
    split: Callable[[Any, int], Sequence[Any]] | None = None,
    module: nn.Module | Sequence[nn.Module] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    chunk_loss_weight: float = 1.0,
    synchronize: bool = True,
    group: Any = None,
) -> CachedLosses:
    """Gradients of ``loss_fn(*embeddings)`` plus the chunks' own losses, added to ``.grad`` as ``backward()`` does.

    Equal to encoding the chunks one after the other with a graph, for any chunk size. Everything happens inside the
    call, so that autocast around it holds for both passes. Without gradients (``torch.no_grad()``) only losses are
    computed. What an encoder counts itself, such as statistics of BatchNorm, it counts twice.

    Under ``torch.distributed`` the chunks' losses are weighted by what all ranks count, for gradients that are averaged
    over ranks: these are then those of one process with all chunks. Only gradients with a graph are: a rank that
    evaluates alone waits for nobody. ``loss_fn`` is a rank's own; :func:`repdeg_fast.contrastive_loss` has ``group=``
    for a batch that ranks share.

    Args:
        encode: takes a chunk and returns its embeddings (n, d), or :class:`Encoded`. Called twice a chunk; it must do
            the same with and without gradients. One for all ``batches``, or one for each.
        loss_fn: takes the embeddings of each batch (N, d), returns a scalar. Its own parameters get gradients, too.
        batches: one or several, e.g. queries and documents: a tensor, or a mapping, tuple or list of tensors, whose
            first dimension is that of the examples.
        chunk_size: examples that are encoded at once.
        split: cuts a batch of another kind: (batch, chunk_size) to a sequence of chunks.
        module: what DistributedDataParallel or FSDP wraps, where ``encode`` is not this module itself; one, or one for
            each batch. Its gradients are synchronized in the last of its chunks alone. FSDP gathers parameters in each
            chunk: all ranks need as many.
        scaler: its scale multiplies all gradients; ``unscale_``, ``step`` and ``update`` are the caller's.
        chunk_loss_weight: of the chunks' losses beside that of the embeddings.
        synchronize: ``False`` leaves gradients unsynchronized, as for all but the last of several batches whose
            gradients accumulate.
        group: of ``torch.distributed``: the ranks that gradients are averaged over, all unless given.

    Raises:
        TypeError, ValueError: naming the argument; also where ``encode`` returns what does not fit its chunk.
    """
    check_size("chunk_size", chunk_size)
    check_finite("chunk_loss_weight", chunk_loss_weight)
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    encoders, modules = _one_each("encode", encode, len(batches)), _one_each("module", module, len(batches))
    columns = [
        [
            _Chunk(part, encoder, encoder if around is None else around)
            for part in (split or split_batch)(batch, chunk_size)
        ]
        for batch, encoder, around in zip(batches, encoders, modules, strict=True)
    ]
    chunks, train = [chunk for column in columns for chunk in column], torch.is_grad_enabled()
    with torch.no_grad():
        for chunk in chunks:
            chunk.encode_first(remember=train)
    # not every PyTorch from 2.10 on knows that copies of weights made without a graph must not serve here
    torch.clear_autocast_cache()
    embeddings = [torch.cat([chunk.first.embeddings for chunk in column]).requires_grad_(train) for column in columns]
    loss = loss_fn(*embeddings)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(f"loss_fn: expected to return a scalar tensor, got {_shown(loss)}")
    chunk_loss, total_count = _mean([chunk.first for chunk in chunks], group, together=train)
    if train:
        if not loss.requires_grad:
            raise ValueError("loss_fn: expected a loss of the embeddings that it is given, got one without a gradient")
        scale: Callable[[Any], Any] = _identity if scaler is None else scaler.scale
        scale(loss).backward()
        weight = None if total_count is None else scale(total_count.new_full((), chunk_loss_weight)) / total_count
        _put_in(columns, _gradients(columns, embeddings), weight, synchronize)
    loss = loss.detach()
    return CachedLosses(loss if chunk_loss is None else loss + chunk_loss_weight * chunk_loss, loss, chunk_loss)


def _gradients(columns: Sequence[Sequence[_Chunk]], embeddings: Sequence[Tensor]) -> Iterator[Tensor]:
    """Those of each chunk's embeddings."""
    for number, (column, leaf) in enumerate(zip(columns, embeddings, strict=True)):
        if leaf.grad is None:
            raise ValueError(f"loss_fn: expected to use the embeddings of every batch, got none of batch {number}")
        yield from leaf.grad.split([len(chunk.first.embeddings) for chunk in column])


def _put_in(
    columns: Sequence[Sequence[_Chunk]], gradients: Iterator[Tensor], weight: Tensor | None, synchronize: bool
) -> None:
    """The second pass. ``weight``: the gradient of what a chunk's loss sums up."""
    chunks = [chunk for column in columns for chunk in column]
    last = {id(chunk.module): number for number, chunk in enumerate(chunks)}
    reached = False
    for number, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        with synchronizing(chunk.module, synchronize and number == last[id(chunk.module)]):
            encoded = chunk.encode_again()
            roots = [(encoded.embeddings, gradient)]
            if encoded.loss is not None and weight is not None and not chunk.is_mean_of_nothing():
                roots.append((encoded.loss, (weight * encoded.count).to(encoded.loss.dtype)))
            roots = [root for root in roots if root[0].requires_grad]  # a frozen encoder has none
            if roots:
                reached = True
                torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
        torch.clear_autocast_cache()
    if not reached:
        raise ValueError(
            "encode: expected embeddings with a gradient, got none in any chunk; no_grad, detach, or frozen?"
        )


def _mean(encoded: Sequence[Encoded], group: Any, together: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of the chunks' losses, weighted by what they count, and how much that is; 0 where it is nothing. ``together``: of
    all ranks, and how much that is a rank."""
    given = [one.loss is not None for one in encoded]
    if not any(given):
        return None, None
    if not all(given):
        raise ValueError(f"encode: expected a loss of every chunk or of none, got {sum(given)} of {len(given)}")
    losses = torch.stack([one.loss.detach() for one in encoded if one.loss is not None])
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))  # 16 bits do not count to 257, or to 65520
    counts = torch.stack([torch.as_tensor(one.count, dtype=losses.dtype, device=losses.device) for one in encoded])
    sums = torch.stack([torch.where(counts > 0, losses * counts, 0).sum(), counts.sum()])
    ranks = _ranks.number(group) if together else 1
    if ranks > 1:
        distributed.all_reduce(sums, group=group)
    loss, total = sums / ranks
    total = total.clamp_min(torch.finfo(losses.dtype).tiny)
    return loss / total, total


def split_batch(batch: Any, size: int) -> list[Any]:
    """A tensor, or a mapping, tuple or list of tensors, in chunks of ``size`` along the first dimension, the last one
    shorter; what is no tensor goes with every chunk.

    Raises:
        ValueError: no tensor, tensors of several lengths, or a size below one.
    """
    check_size("size", size)
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"batch: expected tensors of one length of at least 1, got lengths {sorted(lengths)}")
    return [_part(batch, slice(first, first + size)) for first in range(0, lengths.pop(), size)]


def _part(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part]
    if isinstance(batch, Mapping):
        return {name: _part(value, part) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_part(value, part) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # named tuples
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


class _Chunk:
    """A part of a batch, and what the first pass left of it."""

    first: Encoded
    random_state: RandomState

    def __init__(self, inputs: Any, encoder: Encode, module: Any) -> None:
        self.inputs, self.encoder = inputs, encoder
        self.module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper hides the others'

    def encode_first(self, remember: bool) -> None:
        if remember:
            self.random_state = RandomState(_devices(self.inputs, self.module))
        self.first = self._encode()

    def encode_again(self) -> Encoded:
        with self.random_state.replayed():
            encoded = self._encode()
        if encoded.embeddings.shape != self.first.embeddings.shape or (encoded.loss is None) != (
            self.first.loss is None
        ):
            # one that leaves its loss out without gradients would also draw the random numbers of the next chunk
            raise ValueError("encode: expected to return the same with gradients as without")
        return encoded

    def is_mean_of_nothing(self) -> bool:
        """NaN, which 0 times its gradient would still be. A loss that is 0 there stays: data parallelism waits for the
        gradients of all parameters."""
        loss = self.first.loss
        return loss is not None and not self.first.count and bool(loss.isnan())

    def _encode(self) -> Encoded:
        encoded = self.encoder(self.inputs)
        encoded = encoded if isinstance(encoded, Encoded) else Encoded(encoded)
        if not isinstance(encoded.embeddings, Tensor) or encoded.embeddings.dim() != 2:
            raise ValueError(
                f"encode: expected to return embeddings (n, d) of a chunk, got {_shown(encoded.embeddings)}"
            )
        if encoded.loss is not None and (not isinstance(encoded.loss, Tensor) or encoded.loss.dim()):
            raise ValueError(f"encode: expected the loss of a chunk to be a scalar tensor, got {_shown(encoded.loss)}")
        return encoded


class RandomState:
    """That of the CPU's generator and of those of ``devices``, as it is now."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.states = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d.type).get_rng_state(d) for d in self.devices)]

    def _write(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device.type).set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Once more from there; afterwards as it was before."""
        outside = self._read()
        self._write(self.states)
        try:
            yield
        finally:
            self._write(outside)


@contextmanager
def synchronizing(module: Any, last: bool) -> Iterator[None]:
    """Gradients of a data-parallel ``module`` are synchronized in its last backward pass alone."""
    if last:
        yield
    elif hasattr(module, "no_sync"):  # DistributedDataParallel, FSDP
        with module.no_sync():
            yield
    elif hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def _devices(inputs: Any, module: Any) -> list[torch.device]:
    """Whose generators an encoder may use: of its inputs, of its parameters, and the current one, to which it may move
    inputs."""
    found = {tensor.device for tensor in _tensors(inputs)}
    if isinstance(module, nn.Module):
        found |= {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        found.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


def _one_each(name: str, given: Any, number: int) -> list[Any]:
    several = isinstance(given, Sequence)
    if several and len(given) != number:
        raise ValueError(f"{name}: expected one, or one for each of the {number} batches, got {len(given)}")
    return list(given) if several else [given] * number


def _identity(value: Any) -> Any:
    return value


def _shown(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
