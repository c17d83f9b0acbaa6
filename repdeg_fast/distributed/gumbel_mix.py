"""Gumbel mixing over a vocabulary of which each rank has some rows. Mathematics:
:mod:`repdeg_fast.reference.gumbel_mix`.

Noise belongs to (position, token) of the whole, so each rank makes that of its own columns, and the sample is the one
of one device: ranks reduce the largest z + g, its token, and Σ exp((z + g − largest)/τ), 16 bytes a row. The drawn
tokens' embeddings come from their owners, as a sum to which the others add zeros. In the backward pass dα is linear in
the sums over the vocabulary that it is made of: they are brought to K numbers each before ranks add them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repdeg_fast._arithmetic import arithmetic_dtype, without_autocast
from repdeg_fast._checks import row_of_padding
from repdeg_fast._seeds import seed_tensor
from repdeg_fast.contracts.gumbel_mix import Drawn, Heads, LogitChunk, Noise, Origin, RowState, Sums
from repdeg_fast.contracts.linear_cross_entropy import Columns
from repdeg_fast.distributed import linear_cross_entropy as cross_entropy
from repdeg_fast.distributed.debug import check_same
from repdeg_fast.distributed.shards import (
    VocabularyShard,
    like,
    local_rows,
    on_device,
    part_here,
    shard_of,
    whole_here,
)
from repdeg_fast.functional._head_arguments import Options, check_heads, stacked
from repdeg_fast.functional.gumbel_mix import check_head, detached
from repdeg_fast.native import gumbel_mix as native
from repdeg_fast.ops.chunked_logits import TILE
from repdeg_fast.ops.chunked_vocabulary import ChunkedVocabulary, chunk_buffers, multiply, operand_rows
from repdeg_fast.ops.gumbel_mix import operation
from repdeg_fast.ops.products import operand
from repdeg_fast.reference.gumbel_mix import embed_backward
from repdeg_fast.reference.gumbel_mix_chunks import Chunks

QUAD = 4  # columns that share a call of the noise's generator: chunks begin at one


class Sampling(NamedTuple):
    """As users give it."""

    seed: int | Tensor | None
    temperature: float
    first_position: int
    hard: bool
    gradient_scale: float


class Call(NamedTuple):
    """What a call has beside tensors that are differentiated."""

    shard: VocabularyShard
    noise: Noise
    hard: bool
    gradient_scale: float
    padding_row: int | None  # of the rows here
    backend: str


class Arguments(NamedTuple):
    """Of a call, checked; tensors are plain, those of the vocabulary the rows here."""

    hidden_states: Tensor
    mixture_logits: Tensor | None
    weight: Tensor
    bias: Tensor | None
    embedding: Tensor
    call: Call


@torch.compiler.disable
def gumbel_mix(
    hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None, embedding: Tensor,
    sampling: Sampling, padding_idx: int | None, shard: VocabularyShard | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`repdeg_fast.gumbel_mix` over shards."""
    heads = (hidden_states, mixture_logits, weight, bias, embedding)
    token_ids, values = _sample(_checked("gumbel_mix", *heads, sampling, padding_idx, shard, backend))
    return like(token_ids, hidden_states), like(values, hidden_states)


def _sample(arguments: Arguments, state: RowState | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and values. ``state``: what is known after all of the columns here, should they have been seen."""
    hidden_states, mixture_logits, weight, bias, embedding, call = arguments
    values, token_ids = _GumbelMix.apply(
        hidden_states.detach(), mixture_logits, weight.detach(), detached(bias), embedding, call, state
    )
    return token_ids, values


def _checked(
    operation_name: str, hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None,
    embedding: Tensor, sampling: Sampling, padding_idx: int | None, shard: VocabularyShard | None, backend: str,
) -> Arguments:  # fmt: skip
    hidden_states = whole_here("hidden_states", hidden_states)
    mixture_logits = whole_here("mixture_logits", mixture_logits)
    shard = shard_of(shard, weight)
    bias, tied = local_rows("bias", bias, weight), embedding is weight
    embedding = part_here(local_rows("embedding", embedding, weight))
    weight = embedding if tied else part_here(weight)
    if shard.rows:
        check_head(hidden_states, mixture_logits, weight, bias, embedding)
    padding = row_of_padding(padding_idx, shard.whole)
    seed = _same_seed(sampling.seed, hidden_states, shard)
    check_same(
        shard.group, operation_name, hidden_states=hidden_states, mixture_logits=mixture_logits,
        vocabulary=shard.whole, padding_idx=padding, **sampling._replace(seed=seed)._asdict(),
    )  # fmt: skip
    call = Call(
        shard, Noise(seed, sampling.temperature, sampling.first_position), sampling.hard, sampling.gradient_scale,
        shard.row_of(padding), backend,
    )  # fmt: skip
    return Arguments(hidden_states, mixture_logits, weight, bias, embedding, call)


@torch.compiler.disable
def mlm_losses_and_sample(
    hidden_states: Any, mixture_logits: Tensor | None, weight: Tensor, target: Tensor, bias: Tensor | None,
    embedding: Tensor, options: Options, sampling: Sampling, shard: VocabularyShard | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`repdeg_fast.mlm_losses_and_sample` over shards. On a CPU the losses' logits are in memory, and the sample
    is drawn from a look at them. On a GPU they are not: to bring them there would cost more than the product with the
    mixture that it saves (docs/distributed.md), and there are two sweeps."""
    given, hidden_states = hidden_states, stacked(whole_here("hidden_states", hidden_states))
    name = "mlm_losses_and_sample"
    call = cross_entropy.checked(name, hidden_states, weight, target, bias, options, shard, backend)
    check_heads(call.hidden_states.shape, call.target)
    heads = call.hidden_states
    arguments = _checked(
        name, heads, mixture_logits, weight, bias, embedding, sampling, options.padding_idx, shard, backend
    )
    look = None if heads.is_cuda or options.strategy == "streaming" else _LookAtHeads(arguments)
    losses, *_ = cross_entropy.losses(call._replace(hidden_states=heads.flatten(0, 1)), len(heads), look=look)
    token_ids, values = _sample(arguments, None if look is None else look.state)
    return like(losses, given), like(token_ids, given), like(values, given)


class _GumbelMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None,
        embedding: Tensor, call: Call, state: RowState | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sweeps = _Sweeps(Heads(hidden_states, mixture_logits), weight, bias, embedding, call)
        with without_autocast(hidden_states.device.type), on_device(hidden_states):
            drawn, most = sweeps.compare(sweeps.look() if state is None else state)
            values = sweeps.embed(drawn) if call.hard else sweeps.soft_values(drawn, most)
        ctx.save_for_backward(hidden_states, mixture_logits, weight, bias, embedding, *drawn, most)
        ctx.call = call
        ctx.mark_non_differentiable(drawn.token_ids)
        return values, drawn.token_ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        hidden_states, mixture_logits, weight, bias, embedding, token_ids, peak, most = ctx.saved_tensors
        sweeps = _Sweeps(Heads(hidden_states, mixture_logits), weight, bias, embedding, ctx.call)
        _, wants_mixture, _, _, wants_embedding, *_ = ctx.needs_input_grad
        with without_autocast(hidden_states.device.type), on_device(hidden_states):
            grad_mixture, grad_embedding = sweeps.gradients(
                grad_values.contiguous(), Drawn(token_ids, peak), most, wants_mixture, wants_embedding
            )
        if grad_embedding is not None and ctx.call.padding_row is not None:
            grad_embedding[ctx.call.padding_row] = 0
        return None, grad_mixture, None, None, grad_embedding, None, None


class _LookAtHeads:
    """The sample from the logits of K heads: a look at them, some columns at a time."""

    def __init__(self, arguments: Arguments) -> None:
        hidden_states, mixture_logits, _, bias, _, self.call = arguments
        self.kernels = _chunk_kernels(self.call.backend, hidden_states, arguments.weight)
        self.wide = arithmetic_dtype(hidden_states)
        self.state = _nothing_known(hidden_states[0])
        self.alpha = hidden_states.new_ones(hidden_states.shape[1], 1, dtype=self.wide)
        if mixture_logits is not None:
            self.alpha = mixture_logits.detach().to(self.wide).softmax(dim=1)
        self.bias = None if bias is None else bias.detach().to(self.wide)

    def __call__(self, logits: Tensor, first: int) -> None:
        rows, columns = slice(first, first + logits.shape[1]), self.call.shard.first
        some, alpha = RowState(*(tensor[rows] for tensor in self.state)), self.alpha[rows]
        for part, before in _quads(self.call.shard, TILE):
            mixed = logits.new_full((logits.shape[1], before + part.stop - part.start), -torch.inf, dtype=self.wide)
            torch.mul(alpha[:, :1], logits[0, :, part], out=mixed[:, before:])
            for k in range(1, logits.shape[0]):
                mixed[:, before:].addcmul_(alpha[:, k : k + 1], logits[k, :, part].to(self.wide))
            if self.bias is not None:
                mixed[:, before:] += self.bias[part]
            place = Columns(columns + part.start - before, self.call.shard.whole)
            self.kernels.look(some, LogitChunk(mixed[None], None, place, first), None, self.call.noise)


class _Sweeps:
    """Over the columns here, and what ranks reduce after each."""

    def __init__(self, heads: Heads, weight: Tensor, bias: Tensor | None, embedding: Tensor, call: Call) -> None:
        self.heads, self.weight, self.embedding, self.call = heads, weight, embedding, call
        self.group, self.noise, self.rows = call.shard.group, call.noise, call.shard.rows
        self.kernels: Any = _chunk_kernels(call.backend, heads.hidden_states, weight)
        self.mixed = operand(self.kernels.mix(heads), heads.hidden_states.dtype)
        self.wide = arithmetic_dtype(self.mixed)
        self.bias = None if bias is None else bias.to(self.wide)

    def look(self) -> RowState:
        """What the columns here say of the sample."""
        state = _nothing_known(self.mixed)
        for _, (z,), chunk in self._chunks(1):
            self.kernels.look(state, chunk._replace(logits=z[None]), None, self.noise)
        return state

    def compare(self, state: RowState) -> tuple[Drawn, Tensor]:
        """The sample, from what all ranks' columns say of it, and z + g of its tokens."""
        here, token_ids, total = state
        most = here.clone()
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self.group)
        zero = most.masked_fill(most == -torch.inf, 0)
        total = total * ((here - zero) / self.noise.temperature).exp()
        token_ids = torch.where((here == most) & (here > -torch.inf), token_ids, self.call.shard.whole - 1)
        distributed.all_reduce(token_ids, distributed.ReduceOp.MIN, group=self.group)  # of equals the first, as argmax
        distributed.all_reduce(total, group=self.group)
        return Drawn(token_ids, total.reciprocal_()), most

    def embed(self, drawn: Drawn) -> Tensor:
        """F[x̂], from who has it."""
        mine, local = self.call.shard.local(drawn.token_ids)
        values = self.embedding.new_zeros(len(local), self.embedding.shape[1])
        if self.rows:
            values = torch.where(mine[:, None], self.embedding.index_select(0, local), values)
        distributed.all_reduce(values, group=self.group)
        return self._or_nan(values, drawn)

    def soft_values(self, drawn: Drawn, most: Tensor) -> Tensor:
        """Σ y F."""
        origin, sums = Origin(most, None, None, None), Sums(torch.zeros_like(most), None)
        values = most.new_zeros(len(most), self.embedding.shape[1])
        for part, weights in self._weights(drawn, origin, sums):
            multiply(values, weights[0], operand_rows(self.embedding, part, self.mixed), True)
        both = torch.cat([values, sums.total[:, None]], dim=1)
        distributed.all_reduce(both, group=self.group)
        return self._or_nan((both[:, :-1] / both[:, -1:]).to(self.embedding.dtype), drawn)

    def gradients(
        self, grad_values: Tensor, drawn: Drawn, most: Tensor, wants_mixture: bool, wants_embedding: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of the mixture logits and of the embedding's rows here."""
        grad_embedding = None
        if wants_embedding:
            hard = self.call.hard
            grad_embedding = self._of_drawn_rows(grad_values, drawn) if hard else torch.zeros_like(self.embedding)
        soft = None if self.call.hard else grad_embedding  # yᵀr, a part of the rows at a time
        if not wants_mixture and soft is None:
            return None, grad_embedding
        origin = self._origin(grad_values, drawn, most) if wants_mixture else Origin(most, None, None, None)
        sums = Sums(torch.zeros_like(most), torch.zeros_like(most) if wants_mixture else None)
        products = most.new_zeros(2 if wants_mixture else 0, *self.mixed.shape)
        for part, weights in self._weights(drawn, origin, sums):
            if wants_mixture:
                rows = operand_rows(self.weight, part, self.mixed)
                multiply(products.flatten(0, 1), weights.flatten(0, 1), rows, True)
            if soft is not None:
                soft[part] = weights[0].t().to(self.wide) @ grad_values.to(self.wide)
        return self._mixture_gradient(products, sums, origin) if wants_mixture else None, grad_embedding

    def _of_drawn_rows(self, grad_values: Tensor, drawn: Drawn) -> Tensor:
        """dF[x̂] += r."""
        if not self.rows:
            return torch.zeros_like(self.embedding)
        mine, local = self.call.shard.local(drawn.token_ids)
        own = torch.where(mine[:, None], grad_values, 0)
        return embed_backward(own, self.embedding, drawn._replace(token_ids=local))

    def _mixture_gradient(self, products: Tensor, sums: Sums, origin: Origin) -> Tensor:
        """dα_k = dh̄·h^(k) of Σ y E and Σ y (F·r − F[x̂]·r) E here, then over all ranks, then softmax backward."""
        hidden_states, mixture_logits = self.heads
        assert mixture_logits is not None
        assert sums.delta is not None
        assert origin.norms is not None
        k = len(hidden_states)
        of_heads = [(side * hidden).sum(dim=1) for side in products for hidden in hidden_states.to(self.wide)]
        numbers = torch.stack([*of_heads, sums.total, sums.delta], dim=1)
        distributed.all_reduce(numbers, group=self.group)
        plain, weighted = numbers[:, :k], numbers[:, k : 2 * k]
        total, delta = numbers[:, 2 * k, None], numbers[:, 2 * k + 1, None]
        factor = origin.norms[:, None] * (self.call.gradient_scale / self.noise.temperature)
        grad_alpha = (weighted - delta / total * plain) / total * factor
        alpha = mixture_logits.to(self.wide).softmax(dim=1)
        return (alpha * (grad_alpha - (alpha * grad_alpha).sum(dim=1, keepdim=True))).to(mixture_logits.dtype)

    def _origin(self, grad_values: Tensor, drawn: Drawn, most: Tensor) -> Origin:
        """With r brought to length 1, and F[x̂]·r from who has F[x̂]."""
        r = grad_values.to(self.wide)
        norms = r.norm(dim=1)
        unit = (r * torch.where(norms == 0, 0, 1 / norms)[:, None]).to(self.mixed.dtype)
        mine, local = self.call.shard.local(drawn.token_ids)
        products = torch.zeros_like(most)
        if self.rows:
            drawn_rows = operand(self.embedding.index_select(0, local), unit.dtype).to(self.wide)
            products = torch.where(mine, (drawn_rows * unit.to(self.wide)).sum(dim=1), 0)
        distributed.all_reduce(products, group=self.group)
        return Origin(most, products, norms, unit)

    def _weights(self, drawn: Drawn, origin: Origin, sums: Sums) -> Iterator[tuple[slice, Tensor]]:
        """Rows here, and their y (1, M, W); with an upstream gradient y and y (F·r − F[x̂]·r) (2, M, W)."""
        mine, _ = self.call.shard.local(drawn.token_ids)
        drawn = drawn._replace(token_ids=torch.where(mine, drawn.token_ids, -1))  # no column of the rank before
        for part, wide, chunk in self._chunks(1 if origin.unit is None else 2):
            lead = wide.shape[2] - (part.stop - part.start)
            narrow = wide.view(self.mixed.dtype)[:, :, : wide.shape[2]]  # over the same memory
            weighted = products = None
            if origin.unit is not None:
                weighted, products = narrow[1], wide[1]
                products[:, :lead] = 0
                multiply(products[:, lead:], origin.unit, operand_rows(self.embedding, part, self.mixed).t(), False)
            logits = chunk._replace(logits=wide[:1])
            self.kernels.weights(narrow[0], weighted, sums, logits, products, origin, drawn, self.noise)
            yield part, narrow[:, :, lead:]

    def _chunks(self, count: int) -> Iterator[tuple[slice, Tensor, LogitChunk]]:
        """Rows here, buffers (count, M, W) of which the first has their logits, and their place among all. The first
        chunk begins at a quad of the noise: with columns of the rank before, which are −∞ here."""
        shard = self.call.shard
        if not self.rows:
            return
        buffers = chunk_buffers(count, self.mixed, shard.first % QUAD + self.rows)
        for part, before in _quads(shard, buffers.shape[2]):
            wide = buffers[:, :, : before + part.stop - part.start]
            z = wide[0]
            z[:, :before] = -torch.inf
            multiply(z[:, before:], self.mixed, operand_rows(self.weight, part, self.mixed).t(), False)
            if self.bias is not None:
                z[:, before:] += self.bias[part]
            place = Columns(shard.first + part.start - before, shard.whole)
            yield part, wide, LogitChunk(z[None], None, place, 0)

    def _or_nan(self, values: Tensor, drawn: Drawn) -> Tensor:
        return values.masked_fill_(~drawn.peak.isfinite()[:, None], torch.nan)


def _quads(shard: VocabularyShard, step: int) -> Iterator[tuple[slice, int]]:
    """The rows of a shard in parts that begin at a quad of the noise, and how many columns of the rank before are in
    front of them."""
    lead = shard.first % QUAD
    for begin in range(0, lead + shard.rows if shard.rows else 0, step):
        before = lead if begin == 0 else 0
        yield slice(begin - lead + before, min(begin + step - lead, shard.rows)), before


def _nothing_known(hidden_states: Tensor) -> RowState:
    """Of rows (M, d), before any of the vocabulary."""
    most = hidden_states.new_full(hidden_states.shape[:1], -torch.inf, dtype=arithmetic_dtype(hidden_states))
    return RowState(most, torch.zeros_like(most, dtype=torch.int64), torch.zeros_like(most))


def _chunk_kernels(backend: str, hidden_states: Tensor, weight: Tensor) -> Any:
    """Those of the backend that works on chunks, else PyTorch, with the native generator where there is one."""
    found = operation.kernels(backend, hidden_states, weight)
    if isinstance(found, ChunkedVocabulary):
        return found.kernels
    return Chunks(found.gumbel if isinstance(found, native.Kernels) else None)


def _same_seed(seed: int | Tensor | None, hidden_states: Tensor, shard: VocabularyShard) -> Tensor:
    """Drawn by the first rank, where none is given: the others' generators may be anywhere."""
    found = seed_tensor(seed, hidden_states.device)
    if seed is None:
        distributed.broadcast(found, group=shard.group, group_src=0)
    return found
