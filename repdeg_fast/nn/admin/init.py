"""Where ω starts: ADMIN's profile of a batch, its formulas without one, and DeepNorm's constants."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from repdeg_fast._checks import check_choice, check_flag
from repdeg_fast.nn.admin.norm import AdminNorm
from repdeg_fast.nn.admin.profile import admin_norms, check_batch, observe, stack_of, variances
from repdeg_fast.nn.admin.sharding import check_whole, reshard
from repdeg_fast.nn.admin.table import AdminTable, Sublayer
from repdeg_fast.nn.admin.transformer import AdminDecoderLayer, AdminEncoderLayer, AdminLayer, check_weights

# ω of every sub-layer in a stack of n, by how the change of the stack's output in one update grows with n: the rules of
# the authors' package admin-torch
FORMULAS = {
    "O(logn)": lambda n: math.sqrt((n + 1) / math.log(n + 1) - 1),
    "O(1)": lambda n: math.sqrt(n),
    "O(n)": lambda n: 1.0,
}
RULES = ("profile", *FORMULAS, "default", "deepnorm")


@torch.no_grad()
def initialize_admin_(
    model: nn.Module,
    batch: Any = None,
    rule: str = "profile",
    *,
    group: Any | None = None,
    trainable: bool | None = None,
) -> AdminTable:
    """Set ω of every :class:`~repdeg_fast.AdminNorm` in ``model``, in place. For admin-torch's way, ``rule="default",
    trainable=False``.

    A *stack* is the AdminNorms of one residual stream: those whose names agree up to the first list index, as
    ``encoder.layers`` and ``decoder.layers``. Each stack has its own recursion or its own n, the number of its
    sub-layers.

    Rules:
        ``"profile"``: ω_1 = 1, ω²_{i+1} = Var(ω_i ⊙ x_{i−1}) + Var f_i, measured in one forward pass in which each ω is
            set before its sub-layer ends (arXiv 2004.08249, arXiv 2008.07772). Variances are over all
            elements of the batch, in float64. Under ``torch.distributed`` they are those of all ranks' batches
            together: every rank calls this and gets the same ω.
        ``"O(logn)"`` or ``"default"``: √((n+1)/ln(n+1) − 1); ``"O(1)"``: √n; ``"O(n)"``: 1. No batch is needed; these
            are the rules and names of admin-torch.
        ``"deepnorm"``: α of arXiv 2203.00555 as ω; linear1, linear2, and the value and output projections of every
            attention are multiplied by its β, so call it once, on fresh weights. For AdminEncoderLayer and
            AdminDecoderLayer.

    Args:
        model: in training mode for ``"profile"``.
        batch: what the model is called with: a tuple or list (positional arguments), a mapping (by name) or one value.
            Only ``"profile"`` looks at it.
        rule: one of the above.
        trainable: ``False``: ω becomes a constant, a buffer of one value in the place of the parameter (d,): make the
            optimizer afterwards. ``None``: it stays what it is.
        group: process group of the data-parallel ranks; ``None``: the default one.

    Returns:
        A table (sub-layer, Var f, ω) to index and print; :mod:`repdeg_fast.analysis` saves and draws it.

    Raises:
        ValueError: an unknown rule, a model without AdminNorm (a pre-LN one, say), no batch, eval mode, activations
            that are not finite. ω is then as it was.
    """
    check_choice("rule", rule, RULES)
    rule = "O(logn)" if rule == "default" else rule
    norms = admin_norms(model)
    _check_trainable(model, norms, trainable)
    if rule == "profile":
        _check_profiled(model, norms, batch)
        rows = _profile(model, batch, group)
    elif rule == "deepnorm":
        rows = [Sublayer(stack_of(name), name, alpha) for name, alpha in _deepnorm(model, norms).items()]
    else:
        sizes = Counter(map(stack_of, norms))
        rows = [Sublayer(stack_of(name), name, FORMULAS[rule](sizes[stack_of(name)])) for name in norms]
    reshard(model)
    for row in rows:
        if trainable is False:
            norms[row.name].fix_omega(row.omega)
        else:
            norms[row.name].omega.fill_(row.omega)
    return AdminTable(rule, rows)


def _check_trainable(model: nn.Module, norms: dict[str, AdminNorm], trainable: bool | None) -> None:
    if trainable is None:
        return
    check_flag("trainable", trainable)
    if trainable and (name := next((n for n, norm in norms.items() if not isinstance(norm.omega, nn.Parameter)), None)):
        raise ValueError(f"trainable: expected None or False, since ω of {name} is a constant, got True")
    if not trainable:
        check_whole("model", model, "make ω a constant before you call fully_shard or parallelize_module")


def _check_profiled(model: nn.Module, norms: dict[str, AdminNorm], batch: Any) -> None:
    check_batch(batch, '; rule="O(logn)" needs no batch')
    if evaluating := [name for name, norm in {"": model, **norms}.items() if not norm.training]:
        raise ValueError(
            f"model: expected training mode, in which dropout is part of the variances, got eval mode"
            f"{' at ' + evaluating[0] if evaluating[0] else ''}; call model.train()"
        )


def _profile(model: nn.Module, batch: Any, group: Any | None) -> list[Sublayer]:
    following: dict[str, float] = {}  # of each stack: ω of the sub-layer after the latest
    rows, before = [], []

    def visit(name: str, norm: AdminNorm, x: Tensor, branch: Tensor) -> None:
        stack = stack_of(name)
        omega = following.get(stack, 1.0)
        before.append((norm, norm.omega, norm.omega.clone()))
        norm.omega.fill_(omega)
        stream, own = variances(norm, x, branch, group)
        following[stack] = math.sqrt(stream + own)
        rows.append(Sublayer(stack, name, omega, stream, own))

    try:
        observe(model, batch, visit)
    except BaseException:
        for norm, changed, value in before:
            if norm.omega is changed:  # else it was FSDP2's copy, which is gone
                changed.copy_(value)
        raise
    return rows


def _deepnorm(model: nn.Module, norms: dict[str, AdminNorm]) -> dict[str, float]:
    """α by sub-layer, after multiplying the initial weights by β."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, AdminLayer)}
    owner = {name: name.rpartition(".")[0] for name in norms}
    if strangers := [name for name in norms if owner[name] not in layers]:
        raise ValueError(
            f"model: rule='deepnorm' rescales weights and knows AdminEncoderLayer and AdminDecoderLayer only, got "
            f"{strangers[0]} outside of them"
        )
    for name, layer in layers.items():
        check_weights(name, layer)
    check_whole("model", model, "rescale the weights before you call fully_shard or parallelize_module")
    constants = deepnorm_constants(
        sum(isinstance(layer, AdminEncoderLayer) for layer in layers.values()),
        sum(isinstance(layer, AdminDecoderLayer) for layer in layers.values()),
    )
    kinds = {name: _kind(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        _scale_initial_weights(layer, constants[kinds[name]][1])
    return {name: constants[kinds[owner[name]]][0] for name in norms}


def _kind(layer: AdminLayer) -> type[AdminLayer]:
    """Of which a layer may be a subclass."""
    return AdminEncoderLayer if isinstance(layer, AdminEncoderLayer) else AdminDecoderLayer


def deepnorm_constants(encoder_layers: int, decoder_layers: int) -> dict[type[AdminLayer], tuple[float, float]]:
    """DeepNorm's (α, β) for encoder and decoder layers (arXiv 2203.00555, figure 2).

    A model of encoder layers alone, which is what a decoder-only language model is here, has the paper's constants of
    encoder-only models (those of decoder-only ones are the same).
    """
    n, m = encoder_layers, decoder_layers
    if m == 0:
        return {AdminEncoderLayer: ((2 * n) ** 0.25, (8 * n) ** -0.25)}
    constants: dict[type[AdminLayer], tuple[float, float]] = {}
    if n:
        both = (n**4 * m) ** 0.0625
        constants[AdminEncoderLayer] = 0.81 * both, 0.87 / both
    constants[AdminDecoderLayer] = (3 * m) ** 0.25, (12 * m) ** -0.25
    return constants


def _scale_initial_weights(layer: nn.Module, beta: float) -> None:
    for part in layer.children():
        if isinstance(part, nn.Linear):
            part.weight.mul_(beta)
        elif isinstance(part, nn.MultiheadAttention):
            packed = part.in_proj_weight
            value = part.v_proj_weight if packed is None else packed[2 * part.embed_dim :]
            value.mul_(beta)
            part.out_proj.weight.mul_(beta)
