"""The linear cross entropy over a vocabulary of which each rank has some rows. Mathematics:
:mod:`repdeg_fast.reference.linear_cross_entropy`.

Every rank has all hidden states. It makes ℓ and the log-sum-exp of its own columns with the kernels of one device; then
ranks reduce the largest log-sum-exp, and the sum of exponentials and the target's logit, both from that: 12 bytes a
row. In the backward pass the whole log-sum-exp is known, so that each rank makes the gradients of its columns as of a
tile of the whole. Those of the hidden states are sums over ranks: rows are worked on in pieces, and a piece is reduced
while the next is made. A row's predicted class is 12 bytes more: the largest logits are compared, then their places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repdeg_fast._arithmetic import arithmetic_dtype, weight_of_targets, without_autocast
from repdeg_fast._checks import row_of_padding, wrong_target
from repdeg_fast.contracts.linear_cross_entropy import (
    Columns,
    Gradients,
    Head,
    Look,
    LossRule,
    Upstream,
    Wanted,
)
from repdeg_fast.distributed.debug import check_same
from repdeg_fast.distributed.looks import LogitLooks
from repdeg_fast.distributed.shards import (
    VocabularyShard,
    like,
    local_rows,
    on_device,
    part_here,
    shard_of,
    whole_here,
)
from repdeg_fast.functional._head_arguments import (
    Options,
    check_class_weight,
    check_heads,
    check_options,
    check_tensors,
    shifted,
    stacked,
)
from repdeg_fast.functional._head_outputs import Asked, CrossEntropyOutput, told, told_of_heads
from repdeg_fast.ops.buffers import ranges
from repdeg_fast.ops.chunked_logits import TILE
from repdeg_fast.ops.linear_cross_entropy import Reduction, operation, rule_of, z_loss

IGNORED = -100  # of targets as the kernels get them
PIECES = 4  # of rows, whose gradients are reduced one by one ...
SMALLEST = 1 << 20  # ... if a piece has so many bytes


class Rule(NamedTuple):
    """What a call has beside tensors that are differentiated."""

    shard: VocabularyShard
    of_loss: LossRule  # as kernels take it; class weights are those of the whole vocabulary
    accumulate_dtype: torch.dtype
    padding_row: int | None  # of the rows here
    backend: str

    @property
    def columns(self) -> Columns:
        return Columns(self.shard.first, self.shard.whole)


class Arguments(NamedTuple):
    """Of a call, checked; tensors are plain, those of the vocabulary the rows here."""

    hidden_states: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    options: Options
    rule: Rule


class Found(NamedTuple):
    """On every rank."""

    loss: Tensor  # (K,), or (K, M) without reduction
    lse: Tensor  # (N,)
    predicted: Tensor  # (N,), or empty


def checked(
    operation_name: str, hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    shard: VocabularyShard | None, backend: str, asked: Asked | None = None,
) -> Arguments:  # fmt: skip
    """Arguments as the functions of one device check theirs."""
    options, shard = check_options(options), shard_of(shard, weight)
    bias = local_rows("bias", bias, weight)
    weight = part_here(weight)
    target = whole_here("target", target)
    class_weight = whole_here("class_weight", options.class_weight)
    if options.strategy == "chunked":
        raise ValueError(
            "strategy: expected auto or streaming over shards, where gradients wait for the log-sum-exp of all ranks, "
            "got chunked"
        )
    padding = row_of_padding(options.padding_idx, shard.whole)
    # a rank without rows is checked with one that it does not have
    like_weight, like_bias = weight, bias
    if not shard.rows:
        like_weight = weight.new_empty(1, weight.shape[1])
        like_bias = None if bias is None else bias.new_empty(1)
    hidden_states, _ = check_tensors(
        hidden_states, like_weight, target, like_bias, options._replace(padding_idx=None, class_weight=None)
    )
    if class_weight is not None:
        check_class_weight(class_weight, shard.whole, hidden_states.device)
    of_loss = rule_of(
        hidden_states, class_weight, IGNORED, options.label_smoothing, options.softcap or 0.0,
        options.gradient_filter or 0.0,
    )  # fmt: skip
    rule = Rule(shard, of_loss, options.accumulate_dtype, shard.row_of(padding), backend)
    options = options._replace(padding_idx=padding, class_weight=class_weight)
    check_same(
        shard.group, operation_name, hidden_states=hidden_states, target=target, vocabulary=shard.whole,
        dtype=weight.dtype, has_bias=bias is not None, **options._asdict(),
        **(asked.arguments() if asked else {}),
    )  # fmt: skip
    return Arguments(hidden_states, weight, target, bias, options, rule)


@torch.compiler.disable
def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    shard: VocabularyShard | None, backend: str, asked: Asked,
) -> Any:  # fmt: skip
    """:func:`repdeg_fast.linear_cross_entropy` over shards."""
    given, hidden_states = hidden_states, whole_here("hidden_states", hidden_states)
    call = checked("linear_cross_entropy", hidden_states, weight, target, bias, options, shard, backend, asked=asked)
    positions = call.hidden_states.shape[:-1]
    if call.target.shape != positions:
        raise ValueError(
            f"target: expected shape {tuple(positions)}, that of hidden_states without its last dimension, "
            f"got {tuple(call.target.shape)}"
        )
    target = shifted(call.target, asked.shift, options.ignore_index) if asked.shift else call.target
    call = call._replace(
        hidden_states=call.hidden_states.reshape(-1, call.hidden_states.shape[-1]), target=target.reshape(-1)
    )
    return _like(told(losses(call, 1, asked.predict), call.target, positions, call.options, asked), given)


@torch.compiler.disable
def multi_layer_mlm_loss(
    hidden_states: Any, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    shard: VocabularyShard | None, backend: str, asked: Asked,
) -> Any:  # fmt: skip
    """:func:`repdeg_fast.multi_layer_mlm_loss` over shards."""
    given, hidden_states = hidden_states, stacked(whole_here("hidden_states", hidden_states))
    call = checked("multi_layer_mlm_loss", hidden_states, weight, target, bias, options, shard, backend, asked=asked)
    check_heads(call.hidden_states.shape, call.target)
    call, heads = call._replace(hidden_states=call.hidden_states.flatten(0, 1)), call.hidden_states.shape[0]
    return _like(told_of_heads(losses(call, heads, asked.predict), call.target, heads, call.options, asked), given)


def _like(output: Any, given: Any) -> Any:
    """Each tensor of it."""
    if output is None or isinstance(output, Tensor):
        return output if output is None else like(output, given)
    parts = [_like(part, given) for part in output]
    return CrossEntropyOutput(*parts) if isinstance(output, CrossEntropyOutput) else tuple(parts)


def losses(call: Arguments, heads: int, predict: bool = False, look: Look | None = None) -> Found:
    """Of hidden states (N, d). ``look`` is shown the logits here, position by position of all heads."""
    hidden_states, weight, target, bias, options, rule = call
    counts = target != options.ignore_index
    invalid = ((target < 0) | (target >= rule.shard.whole)) & counts
    if target.device.type == "cpu" and bool(invalid.any()):
        raise wrong_target(int(target[invalid][0]), rule.shard.whole, options.ignore_index)
    target = torch.where(counts, target, IGNORED).where(~invalid, rule.shard.whole)
    rows, lse, predicted = _Losses.apply(hidden_states, weight, bias, target, rule, predict, look)
    loss = rows.view(heads, target.shape[0])
    class_weight = rule.of_loss.class_weight
    if options.reduction != "none":
        count: Any = 1
        if options.reduction == "mean":
            count = counts.sum().clamp_min(1)
            if class_weight is not None:
                count = weight_of_targets(target, IGNORED, class_weight.each)
        loss = (loss.sum(dim=1, dtype=torch.float64) / count).to(rows.dtype)
    if options.lse_square_scale:
        loss = loss + z_loss(lse, target, IGNORED, Reduction(heads, options.lse_square_scale, options.reduction, None))
    return Found(loss, lse, predicted)


class _Losses(torch.autograd.Function):
    """ℓ and lse of rows (N,), and their predicted classes; a target (M,) is a token, ``IGNORED``, or V where it is none
    of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rule: Rule,
        predict: bool, look: Look | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        head = Head(hidden_states, weight, target, bias)
        smoothing, softcap = rule.of_loss.label_smoothing, rule.of_loss.softcap
        looks = LogitLooks(
            head, rule.of_loss, rule.columns, predict=predict, add_up=bool(smoothing and softcap), other=look
        )
        own, lse = _of_columns(head, rule, looks.wanted)
        numbers = lse.clone() if looks.most is None else torch.cat([lse, looks.most])
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=rule.shard.group)
        most, n = numbers[: len(lse)], len(lse)
        predicted = _first_of_largest(looks, numbers[n:], rule)
        origin = torch.where(most == -torch.inf, 0, most)
        target = target.repeat(n // max(len(target), 1))
        mine, _ = rule.shard.local(target)
        of_target, of_all = _shares(target, rule, lse.dtype)
        # ℓ counts from the log-sum-exp of these columns alone: from the origin, the target's logit is that − ℓ
        target_logit = torch.where(mine, of_target * (lse - origin - own), 0)
        if smoothing and rule.shard.rows:
            with without_autocast(hidden_states.device.type):
                target_logit = target_logit + _smoothing(head, looks, origin, rule)
        sums = torch.stack([(lse - origin).exp(), target_logit])
        distributed.all_reduce(sums, group=rule.shard.group)
        log_total, target_logit = sums[0].log(), sums[1]
        lse = origin + log_total
        loss = (of_all * log_total - target_logit).masked_fill_(target == IGNORED, 0)
        loss.masked_fill_(target == rule.shard.whole, torch.nan)
        ctx.save_for_backward(hidden_states, weight, bias, target, lse)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(predicted)
        return loss, lse, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None and grad_lse is None:
            return (None,) * 7
        hidden_states, weight, bias, target, lse = ctx.saved_tensors
        wanted = Wanted.of(list(ctx.needs_input_grad[:3]), ctx.rule.accumulate_dtype)
        of_loss = torch.zeros_like(lse) if grad_loss is None else grad_loss.contiguous()
        upstream = Upstream(of_loss, None if grad_lse is None else grad_lse.contiguous())
        head = Head(hidden_states, weight, target, bias)
        with without_autocast(hidden_states.device.type), on_device(hidden_states):
            gradients = _Pieces(head, lse, ctx.rule, wanted).gradients(upstream)
        if gradients.weight is not None and ctx.rule.padding_row is not None:
            gradients.weight[ctx.rule.padding_row] = 0
        return *gradients, None, None, None, None


def _of_columns(head: Head, rule: Rule, look: Look | None) -> tuple[Tensor, Tensor]:
    """ℓ and lse of rows, of the columns here alone: 0 where the target is none of them, and plain, that is without
    smoothing and class weights."""
    hidden_states, weight, target, _ = head
    if not rule.shard.rows:
        lse = hidden_states.new_full(hidden_states.shape[:1], -torch.inf, dtype=arithmetic_dtype(hidden_states))
        return torch.zeros_like(lse), lse
    mine, local = rule.shard.local(target)
    plain = LossRule(IGNORED, 0.0, rule.of_loss.softcap)
    with without_autocast(hidden_states.device.type), on_device(hidden_states):
        kernels = operation.kernels(rule.backend, hidden_states, weight)
        return kernels.forward(head._replace(target=torch.where(mine, local, IGNORED)), plain, look=look)


def _first_of_largest(looks: LogitLooks, most: Tensor, rule: Rule) -> Tensor:
    """The first class of the whole vocabulary with the largest logit."""
    if looks.most is None or looks.classes is None:
        return most.new_empty(0, dtype=torch.int64)
    classes = torch.where(looks.most == most, looks.classes, rule.shard.whole)
    distributed.all_reduce(classes, distributed.ReduceOp.MIN, group=rule.shard.group)
    return classes.where(classes < rule.shard.whole, 0)  # no largest one: not a number


def _shares(target: Tensor, rule: Rule, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of y: what falls to each row's target beside what falls to every class, and the sum of all."""
    smoothing, class_weight = rule.of_loss.label_smoothing, rule.of_loss.class_weight
    if class_weight is None:
        one = torch.ones((), dtype=wide, device=target.device)
        return (1 - smoothing) * one, one
    known = (target >= 0) & (target < rule.shard.whole)
    of_target = (1 - smoothing) * class_weight.each.index_select(0, target.where(known, 0))
    return of_target, of_target + smoothing / rule.shard.whole * class_weight.total


def _smoothing(head: Head, looks: LogitLooks, origin: Tensor, rule: Rule) -> Tensor:
    """ε/V times the weighted sum of a row's logits here, from the origin: without a softcap h·Σ w E + Σ w b."""
    hidden_states, weight, _, bias = head
    total, of_class, wide = looks.sums, looks.class_weight, origin.dtype
    seen = weight.shape[0] if of_class is None else of_class.sum()
    if total is None:
        total = hidden_states.to(wide) @ _sum_of_rows(weight, of_class, wide)
        if bias is not None:
            total = total + (bias.sum(dtype=wide) if of_class is None else of_class @ bias.to(wide))
    return (total - seen * origin) * (rule.of_loss.label_smoothing / rule.shard.whole)


def _sum_of_rows(weight: Tensor, of_class: Tensor | None, wide: torch.dtype) -> Tensor:
    if of_class is None:
        return weight.sum(dim=0, dtype=wide)
    total = weight.new_zeros(weight.shape[1], dtype=wide)
    for part in ranges(weight.shape[0], TILE):  # not widened as a whole
        total += of_class[slice(*part)] @ weight[slice(*part)].to(wide)
    return total


class _Pieces:
    """The backward pass, some rows at a time; each has its target in ``head``."""

    def __init__(self, head: Head, lse: Tensor, rule: Rule, wanted: Wanted) -> None:
        self.head, self.lse, self.rule, self.wanted = head, lse, rule, wanted

    def gradients(self, upstream: Upstream) -> Gradients:
        hidden_states, weight, _, bias = self.head
        grad_hidden = torch.empty_like(hidden_states) if self.wanted.hidden_states else None
        made: list[Gradients] = []
        works = []
        for part in self._parts():
            piece = self._piece(part, upstream)
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

    def _piece(self, part: slice, upstream: Upstream) -> Gradients:
        hidden_states, weight, target, bias = self.head
        if not self.rule.shard.rows:
            grad_bias = torch.zeros_like(bias) if self.wanted.bias and bias is not None else None
            grad_weight = torch.zeros_like(weight) if self.wanted.weight else None
            return Gradients(torch.zeros_like(hidden_states[part]), grad_weight, grad_bias)
        head = Head(hidden_states[part], weight, target[part], bias)
        some = Upstream(*(None if tensor is None else tensor[part] for tensor in upstream))  # type: ignore[arg-type]
        kernels = operation.kernels(self.rule.backend, hidden_states, weight)
        return kernels.backward(some, head, self.lse[part], self.rule.of_loss, self.wanted, self.rule.columns)

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
