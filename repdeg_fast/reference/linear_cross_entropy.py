"""Cross entropy of a linear layer, z = softcap(h Eᵀ + b), without keeping the (N, V) logits.

N rows of hidden states h, of which row r belongs to target x = target[r mod M]: K heads of M rows each share one
target vector (AMOS, arXiv 2204.03243, equation 4; K = 1 is the ordinary loss). With label smoothing ε, class weights w
(1 without) and y_v = (1 − ε) w_x [v = x] + ε w_v/V, as in torch.nn.functional.cross_entropy,

    lse = log Σ_v exp z_v,        ℓ = Σ_v y_v (lse − z_v)        (0 where x is ignore_index)

and, with upstream gradients g for ℓ and u for lse, p = exp(z − lse), softcap(a) = c·tanh(a/c):

    ∂/∂z_v = (g Σ y + u) p_v − g y_v,        ∂/∂(h Eᵀ + b) = ∂/∂z · (1 − (z/c)²)
    dh = dz E,        dE = dzᵀ h,        db = Σ_r dz

A z-loss (PaLM, arXiv 2204.02311, section 5) adds q·lse² to rows that count: u = 2q·lse. A gradient filter t leaves out
the ∂/∂z_v of v ≠ x with p_v < t. The mean is over Σ w_x, that of a z-loss over the number of rows that count. Sums are
in fp32 (fp64 for doubles).
"""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, scale_or_repeat_, softcapped, weight_of_targets
from repdeg_fast._checks import wrong_target
from repdeg_fast.contracts.linear_cross_entropy import (
    Columns,
    Gradients,
    GradRows,
    Head,
    Look,
    LossRule,
    Upstream,
    Wanted,
)


def at_once(head: Head, rule: LossRule, heads: int, mean: bool, wanted: Wanted) -> None:
    """Step by step."""


def share(head: Head, rule: LossRule, mean: bool) -> Tensor:
    """1, or for a mean 1/n, n targets that count, or 1 over their classes' weights, (); on a CPU, values are looked
    at."""
    target, vocabulary, dtype = head.target, len(head.weight), arithmetic_dtype(head.hidden_states)
    counts = target != rule.ignore_index
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= vocabulary)) & counts]
        if len(wrong):
            raise wrong_target(int(wrong[0]), vocabulary, rule.ignore_index)
    if not mean:
        return head.hidden_states.new_ones((), dtype=dtype)
    if rule.class_weight is None:
        return counts.sum().clamp_min(1).to(dtype).reciprocal()
    return 1 / weight_of_targets(target, rule.ignore_index, rule.class_weight.each)


def total(losses: Tensor, heads: int, share: Tensor) -> Tensor:
    """Of each head's rows, in double."""
    return losses.view(heads, len(losses) // heads).sum(1, dtype=torch.float64).mul_(share).to(losses.dtype)


def forward(
    head: Head, rule: LossRule, predicted: Tensor | None = None, look: Look | None = None
) -> tuple[Tensor, Tensor]:
    """ℓ and lse of every row, (N,) each, and the class with the largest logit."""
    if look is not None and len(head.target):
        look(_logits(head._replace(bias=None), 0.0).unflatten(0, (-1, len(head.target))), 0)
    z, whole = _logits(head, rule.softcap), Columns(0, len(head.weight))
    target, ignored, invalid = _rows_of_target(head, rule.ignore_index, whole)
    if predicted is not None:
        predicted.copy_(z.argmax(dim=1))
    log_p = z.log_softmax(dim=1)  # z − lse, as exact where z is far from zero as elsewhere
    of_target, of_each = _label_distribution(target, z, rule, whole)
    loss = -of_target * log_p.gather(1, target[:, None])[:, 0]
    if rule.label_smoothing:
        loss = loss - (of_each * log_p).sum(dim=1)
    return loss.masked_fill(invalid, float("nan")).masked_fill(ignored, 0), z.logsumexp(dim=1)


def backward(
    upstream: Upstream, head: Head, lse: Tensor, rule: LossRule, wanted: Wanted, columns: Columns | None = None
) -> Gradients:
    """The gradients of Σ g·ℓ + Σ u·lse."""
    hidden_states, weight, _, bias = head
    z, whole = _logits(head, rule.softcap), columns or Columns(0, len(weight))
    target, ignored, invalid = _rows_of_target(head, rule.ignore_index, whole)
    g = upstream.grad_loss.masked_fill(invalid, float("nan")).masked_fill(ignored, 0)[:, None]
    u = torch.zeros_like(g) if upstream.grad_lse is None else upstream.grad_lse[:, None]
    of_target, of_each = _label_distribution(target, z, rule, whole)
    p = _softmax(z, lse[:, None])
    here = slice(whole.first, whole.first + len(weight))
    is_target = torch.arange(here.start, here.stop, device=z.device) == target[:, None]
    dz = (g * (of_target[:, None] + of_each.sum()) + u) * p - g * of_each[here]
    dz -= torch.where(is_target, g * of_target[:, None], 0)
    if rule.softcap:
        dz = dz * (1 - (z / rule.softcap) ** 2)
    if rule.gradient_filter:
        dz.masked_fill_((p < rule.gradient_filter) & ~(is_target & ~ignored[:, None]), 0)
    dz.masked_fill_((g == 0) & (u == 0), 0)  # a row that does not count gives nothing, even where z is not a number
    return Gradients(
        (dz @ weight.to(z.dtype)).to(hidden_states.dtype) if wanted.hidden_states else None,
        (dz.T @ hidden_states.to(z.dtype)).to(weight.dtype) if wanted.weight else None,
        dz.sum(dim=0).to(bias.dtype) if wanted.bias and bias is not None else None,
    )


def forward_backward(
    upstream: Upstream, head: Head, rule: LossRule, wanted: Wanted, look: Look | None = None,
    predicted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
    """Both, where g, u and q are known beforehand."""
    loss, lse = forward(head, rule, predicted, look)
    return loss, lse, backward(upstream.at(lse, head.target, rule.ignore_index), head, lse, rule, wanted)


def rescale_(
    gradients: Gradients, grad_heads: Tensor, rows: GradRows, head: Head, rule: LossRule, wanted: Wanted
) -> None:
    """See the contract."""
    scale_or_repeat_(gradients, grad_heads, lambda: forward_backward(rows(), head, rule, wanted)[2])


def _softmax(z: Tensor, lse: Tensor) -> Tensor:
    """exp(z − lse), as exact where z is far from zero as elsewhere; of columns that may be some of the vocabulary,
    whose lse it is."""
    here = z.logsumexp(dim=1, keepdim=True)
    nothing = (here == -torch.inf) & (lse > -torch.inf)
    return (z.softmax(dim=1) * (here - lse).exp()).masked_fill_(nothing, 0)


def _logits(head: Head, softcap: float) -> Tensor:
    """(N, V) in the arithmetic dtype."""
    hidden_states, weight, _, bias = head
    dtype = arithmetic_dtype(hidden_states)
    z = hidden_states.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return softcapped(z, softcap)


def _rows_of_target(head: Head, ignore_index: int, whole: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """One class of the whole vocabulary a row, and which rows are ignored and which invalid."""
    target = head.target.long().repeat(len(head.hidden_states) // max(len(head.target), 1))
    ignored = target == ignore_index
    invalid = ((target < 0) | (target >= whole.vocabulary)) & ~ignored
    return target.masked_fill(ignored | invalid, 0), ignored, invalid


def _label_distribution(target: Tensor, z: Tensor, rule: LossRule, whole: Columns) -> tuple[Tensor, Tensor]:
    """y: what falls to each row's target (N,), and what to every class (V,), to all rows alike."""
    weight = z.new_ones(whole.vocabulary) if rule.class_weight is None else rule.class_weight.each
    return (1 - rule.label_smoothing) * weight[target], rule.label_smoothing / whole.vocabulary * weight
