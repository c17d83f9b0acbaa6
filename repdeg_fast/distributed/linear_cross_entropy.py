"""The linear cross entropy over a vocabulary of which each rank has some rows. Mathematics:
:mod:`repdeg_fast.reference.linear_cross_entropy`.

Every rank has all hidden states. It makes ℓ and the log-sum-exp of its own columns with the kernels of one device; then
ranks reduce the largest log-sum-exp, and the sum of exponentials and the target's logit, both from that: 12 bytes a
row. In the backward pass the whole log-sum-exp is known, so that each rank makes the gradients of its columns. Those
of the hidden states are sums over ranks: rows are worked on in pieces, and a piece is reduced while the next is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repdeg_fast._arithmetic import arithmetic_dtype, without_autocast
from repdeg_fast._checks import row_of_padding, wrong_target
from repdeg_fast.contracts.linear_cross_entropy import Gradients, Head, LossRule, Upstream, Wanted
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
from repdeg_fast.functional._head_arguments import Options, check_heads, check_options, check_tensors, stacked
from repdeg_fast.ops.linear_cross_entropy import operation

IGNORED = -100  # of targets as the kernels get them
PIECES = 4  # of rows, whose gradients are reduced one by one ...
SMALLEST = 1 << 20  # ... if a piece has so many bytes


class Rule(NamedTuple):
    """What a call has beside tensors."""

    shard: VocabularyShard
    ignore_index: int
    label_smoothing: float
    softcap: float
    accumulate_dtype: torch.dtype
    padding_row: int | None  # of the rows here
    backend: str


class Arguments(NamedTuple):
    """Of a call, checked; tensors are plain, those of the vocabulary the rows here."""

    hidden_states: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    options: Options
    rule: Rule


def checked(
    operation_name: str, hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    shard: VocabularyShard | None, backend: str, **others: Any,
) -> Arguments:  # fmt: skip
    """Arguments as the functions of one device check theirs."""
    options, shard = check_options(options), shard_of(shard, weight)
    bias = local_rows("bias", bias, weight)
    weight = part_here(weight)
    target = whole_here("target", target)
    if options.strategy == "chunked":
        raise ValueError(
            "strategy: expected auto or streaming over shards, where gradients wait for the log-sum-exp of all ranks, "
            "got chunked"
        )
    _check_served(options)
    if options.label_smoothing and options.softcap:
        raise ValueError("softcap: expected None over shards together with label_smoothing, got both")
    padding = row_of_padding(options.padding_idx, shard.whole)
    # a rank without rows is checked with one that it does not have
    like_weight, like_bias = weight, bias
    if not shard.rows:
        like_weight = weight.new_empty(1, weight.shape[1])
        like_bias = None if bias is None else bias.new_empty(1)
    hidden_states, options = check_tensors(
        hidden_states, like_weight, target, like_bias, options._replace(padding_idx=None)
    )
    rule = Rule(
        shard, options.ignore_index, options.label_smoothing, float(options.softcap or 0), options.accumulate_dtype,
        shard.row_of(padding), backend,
    )  # fmt: skip
    check_same(
        shard.group, operation_name, hidden_states=hidden_states, target=target, vocabulary=shard.whole,
        dtype=weight.dtype, has_bias=bias is not None, **options._replace(padding_idx=padding)._asdict(), **others,
    )  # fmt: skip
    return Arguments(hidden_states, weight, target, bias, options, rule)


def _check_served(options: Options) -> None:
    for name, default in Options._field_defaults.items():  # what came later than the rest, on one device
        value = getattr(options, name)
        if value is not None and (isinstance(value, Tensor) or value != default):
            raise ValueError(
                f"{name}: expected none over shards, where it is not served, got {value!r:.60}; gather the weight"
            )


@torch.compiler.disable
def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    shard: VocabularyShard | None, backend: str, return_lse: bool,
) -> Any:  # fmt: skip
    """:func:`repdeg_fast.linear_cross_entropy` over shards."""
    given, hidden_states = hidden_states, whole_here("hidden_states", hidden_states)
    call = checked("linear_cross_entropy", hidden_states, weight, target, bias, options, shard, backend)
    positions = call.hidden_states.shape[:-1]
    if call.target.shape != positions:
        raise ValueError(
            f"target: expected shape {tuple(positions)}, that of hidden_states without its last dimension, "
            f"got {tuple(call.target.shape)}"
        )
    call = call._replace(hidden_states=call.hidden_states.reshape(-1, call.hidden_states.shape[-1]))
    loss, lse = losses(call._replace(target=call.target.reshape(-1)), 1)
    loss = like(loss.view(positions if options.reduction == "none" else ()), given)
    return (loss, like(lse.view(positions), given)) if return_lse else loss


@torch.compiler.disable
def multi_layer_mlm_loss(
    hidden_states: Any, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    shard: VocabularyShard | None, backend: str,
) -> Tensor:  # fmt: skip
    """:func:`repdeg_fast.multi_layer_mlm_loss` over shards."""
    given, hidden_states = hidden_states, stacked(whole_here("hidden_states", hidden_states))
    call = checked("multi_layer_mlm_loss", hidden_states, weight, target, bias, options, shard, backend)
    check_heads(call.hidden_states.shape, call.target)
    return like(
        losses(call._replace(hidden_states=call.hidden_states.flatten(0, 1)), len(call.hidden_states))[0], given
    )


def losses(call: Arguments, heads: int) -> tuple[Tensor, Tensor]:
    """(K,), or (K, M) without reduction, and the log-sum-exps (N,), of hidden states (N, d)."""
    hidden_states, weight, target, bias, options, rule = call
    counts = target != rule.ignore_index
    invalid = ((target < 0) | (target >= rule.shard.whole)) & counts
    if target.device.type == "cpu" and bool(invalid.any()):
        raise wrong_target(int(target[invalid][0]), rule.shard.whole, rule.ignore_index)
    target = torch.where(counts, target, IGNORED).where(~invalid, rule.shard.whole)
    rows, lse = _Losses.apply(hidden_states, weight, bias, target.repeat(heads), rule)
    loss = rows.view(heads, -1) if len(target) else rows.view(heads, 0)
    if options.reduction != "none":
        count = counts.sum().clamp_min(1) if options.reduction == "mean" else 1
        loss = (loss.sum(dim=1, dtype=torch.float64) / count).to(rows.dtype)
    return loss, lse


class _Losses(torch.autograd.Function):
    """ℓ and lse of rows; a target is a token, ``IGNORED``, or V where it is none of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        mine, local = _local(target, rule)
        wide = arithmetic_dtype(hidden_states)
        lse, own = hidden_states.new_full(target.shape, -torch.inf, dtype=wide), hidden_states.new_zeros((), dtype=wide)
        if rule.shard.rows:
            with without_autocast(hidden_states.device.type), on_device(hidden_states):
                own, lse = operation.kernels(rule.backend, hidden_states, weight).forward(
                    Head(hidden_states, weight, local, bias), LossRule(IGNORED, 0.0, rule.softcap)
                )
        most = lse.clone()
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=rule.shard.group)
        origin = torch.where(most == -torch.inf, 0, most)
        # ℓ counts from the log-sum-exp of these columns alone: from the origin, the target's logit is that − ℓ
        target_logit = torch.where(mine, lse - origin - own, 0)
        if rule.label_smoothing:
            target_logit = (1 - rule.label_smoothing) * target_logit + _smoothing(
                hidden_states, weight, bias, origin, rule
            )
        sums = torch.stack([(lse - origin).exp(), target_logit])
        distributed.all_reduce(sums, group=rule.shard.group)
        log_total, target_logit = sums[0].log(), sums[1]
        lse = origin + log_total
        loss = (log_total - target_logit).masked_fill_(target == IGNORED, 0)
        loss.masked_fill_(target == rule.shard.whole, torch.nan)
        ctx.save_for_backward(hidden_states, weight, bias, target, lse)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None and grad_lse is None:
            return (None,) * 5
        hidden_states, weight, bias, target, lse = ctx.saved_tensors
        wanted = Wanted.of(list(ctx.needs_input_grad[:3]), ctx.rule.accumulate_dtype)
        upstream = _upstream(grad_loss, grad_lse, target, ctx.rule)
        head = Head(hidden_states, weight, target, bias)
        with without_autocast(hidden_states.device.type), on_device(hidden_states):
            gradients = _Pieces(head, lse, ctx.rule, wanted).gradients(*upstream)
        if gradients.weight is not None and ctx.rule.padding_row is not None:
            gradients.weight[ctx.rule.padding_row] = 0
        return *gradients, None, None


def _local(target: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which rows' targets are here, and targets as the kernels take them."""
    mine, local = rule.shard.local(target)
    return mine, torch.where(mine, local, IGNORED)


def _upstream(
    grad_loss: Tensor | None, grad_lse: Tensor | None, target: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """g of rows that count, and what the kernels get so that dz = (g + u) p − (1 − ε) g [v = x]: they take g + u from
    the log-sum-exp, and what a row with its target here has besides."""
    given = grad_loss if grad_loss is not None else grad_lse
    assert given is not None
    g = torch.zeros_like(given) if grad_loss is None else grad_loss.masked_fill(target == IGNORED, 0)
    g = g.masked_fill(target == rule.shard.whole, torch.nan)
    u = torch.zeros_like(g) if grad_lse is None else grad_lse
    mine, _ = _local(target, rule)
    of_loss = torch.where(mine, (1 - rule.label_smoothing) * g, 0)
    return g, of_loss, (g + u - of_loss).contiguous()


def _column_sums(weight: Tensor, wide: torch.dtype) -> Tensor:
    return weight.sum(dim=0, dtype=wide)


def _smoothing(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, origin: Tensor, rule: Rule) -> Tensor:
    """ε/V times the sum of a row's logits here, from the origin: h·Σ E + Σ b, no logits needed."""
    total = hidden_states.to(origin.dtype) @ _column_sums(weight, origin.dtype) - rule.shard.rows * origin
    if bias is not None:
        total += bias.sum(dtype=origin.dtype)
    return total * (rule.label_smoothing / rule.shard.whole)


class _Pieces:
    """The backward pass, some rows at a time."""

    def __init__(self, head: Head, lse: Tensor, rule: Rule, wanted: Wanted) -> None:
        self.head, self.lse, self.rule, self.wanted = head, lse, rule, wanted
        _, self.local = _local(head.target, rule)

    def gradients(self, g: Tensor, of_loss: Tensor, of_lse: Tensor) -> Gradients:
        hidden_states, weight, _, bias = self.head
        grad_hidden = torch.empty_like(hidden_states) if self.wanted.hidden_states else None
        made: list[Gradients] = []
        works = []
        for part in self._parts():
            piece = self._piece(part, of_loss, of_lse)
            if self.rule.label_smoothing:
                self._smooth(piece, part, g)
            if grad_hidden is not None and piece.hidden_states is not None:
                grad_hidden[part] = piece.hidden_states
                works.append(distributed.all_reduce(grad_hidden[part], group=self.rule.shard.group, async_op=True))
            made = [self._sum(made, piece)]
        for work in works:
            work.wait()
        (total,) = made
        grad_weight = None if total.weight is None else total.weight.to(weight.dtype)
        grad_bias = None if total.bias is None or bias is None else total.bias.to(bias.dtype)
        return Gradients(grad_hidden, grad_weight, grad_bias)

    def _parts(self) -> list[slice]:
        """Pieces, where there is something to reduce in the meantime and it takes its time."""
        n, bytes_ = len(self.lse), self.head.hidden_states.nbytes
        pieces = max(1, min(PIECES, bytes_ // SMALLEST)) if self.wanted.hidden_states else 1
        step = max(1, -(-n // pieces))
        return [slice(first, first + step) for first in range(0, max(n, 1), step)]

    def _piece(self, part: slice, of_loss: Tensor, of_lse: Tensor) -> Gradients:
        hidden_states, weight, _, bias = self.head
        if not self.rule.shard.rows:
            grad_bias = torch.zeros_like(bias) if self.wanted.bias and bias is not None else None
            grad_weight = torch.zeros_like(weight) if self.wanted.weight else None
            return Gradients(torch.zeros_like(hidden_states[part]), grad_weight, grad_bias)
        head = Head(hidden_states[part], weight, self.local[part], bias)
        upstream = Upstream(of_loss[part], of_lse[part].contiguous())
        kernels = operation.kernels(self.rule.backend, hidden_states, weight)
        return kernels.backward(upstream, head, self.lse[part], LossRule(IGNORED, 0.0, self.rule.softcap), self.wanted)

    def _smooth(self, piece: Gradients, part: slice, g: Tensor) -> None:
        """Every logit of a row that counts gets −ε g/V besides."""
        hidden_states, weight, _, _ = self.head
        share = g[part] * (-self.rule.label_smoothing / self.rule.shard.whole)
        if piece.hidden_states is not None:
            piece.hidden_states.add_(share[:, None] * _column_sums(weight, g.dtype))
        if piece.weight is not None:
            piece.weight.add_((share @ hidden_states[part].to(g.dtype)).to(weight.dtype))
        if piece.bias is not None:
            piece.bias.add_(share.sum().to(piece.bias.dtype))

    def _sum(self, made: list[Gradients], piece: Gradients) -> Gradients:
        """Of the weight and the bias, over pieces in the dtype that sums are made in."""
        if not made:
            return piece._replace(hidden_states=None)
        (total,) = made
        weight, bias = total.weight, total.bias
        if weight is not None and piece.weight is not None:
            weight = weight.to(torch.promote_types(weight.dtype, self.wanted.accumulate_dtype)).add_(piece.weight)
        if bias is not None and piece.bias is not None:
            bias = bias.to(self.lse.dtype).add_(piece.bias)
        return Gradients(None, weight, bias)
