"""Looking at a model's residual blocks while a batch runs through it, and what each block's branch explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from repdeg_fast import _ranks
from repdeg_fast._checks import check_module
from repdeg_fast.nn.admin.norm import AdminNorm
from repdeg_fast.nn.admin.table import DependencyTable, Share

Visit = Callable[[str, AdminNorm, Tensor, Tensor], None]  # name, module, x, branch
_VALUES_AT_A_TIME = 1 << 22  # so that the float64 copies stay small beside the activations


def residual_dependency(model: nn.Module, batch: Any, *, group: Any | None = None) -> DependencyTable:
    """How much of each sub-layer's output its stack's input and each residual branch explain (ADMIN,
    arXiv 2004.08249, section 4).

    With x_i = LayerNorm(ω_i ⊙ x_{i−1} + f_i), branch f_i makes up Var f_i / (Var(ω_i ⊙ x_{i−1}) + Var f_i) of x_i, and
    the sources of x_{i−1} share the rest in the proportions they have there. As in the paper the branches count as
    uncorrelated. One forward pass, in the mode the model is in.

    Args:
        model, batch, group: as in :func:`repdeg_fast.initialize_admin_`.

    Returns:
        A table to index and print; :mod:`repdeg_fast.analysis` saves and draws it. The shares of one output add
        up to 1.
    """
    rows: dict[str, list[Share]] = {}  # of each stack: the sources of its latest output
    records: list[Share] = []

    def visit(name: str, norm: AdminNorm, x: Tensor, branch: Tensor) -> None:
        stack = stack_of(name)
        stream, own = variances(norm, x, branch, group)
        earlier = rows.get(stack, [Share(stack, name, "input", 1.0)])
        rest = stream / (stream + own)
        rows[stack] = [Share(stack, name, source.source, source.share * rest) for source in earlier]
        rows[stack].append(Share(stack, name, name, own / (stream + own)))
        records.extend(rows[stack])

    check_batch(batch)
    observe(model, batch, visit)
    return DependencyTable(records)


def admin_norms(model: nn.Module) -> dict[str, AdminNorm]:
    """The residual blocks of ``model`` by name, in the order of registration."""
    check_module("model", model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, AdminNorm)}
    if not norms:
        pre_ln = any(getattr(module, "norm_first", False) for module in model.modules())
        raise ValueError(
            f"model: expected AdminNorm modules in it, got {type(model).__name__} without"
            + ("; it is pre-LN (norm_first=True), and ADMIN is for post-LN models" if pre_ln else "")
            + "; build it of repdeg_fast.nn.AdminEncoderLayer and the like, or see repdeg_fast.nn.from_torch"
        )
    return norms


def check_batch(batch: Any, remedy: str = "") -> None:
    if batch is None:
        raise ValueError(f"batch: expected what the model is called with, got None{remedy}")


def stack_of(name: str) -> str:
    """The stack whose residual stream the module is part of: its name up to the first list index, as in
    ``encoder.layers`` for ``encoder.layers.3.norm1``; without an index, the module that holds it."""
    parts = name.split(".")
    index = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:index])


def observe(model: nn.Module, batch: Any, visit: Visit) -> None:
    """Run ``model`` on ``batch`` without gradients; call ``visit`` before each AdminNorm, in the order of execution.

    Raises:
        ValueError: a block that the batch does not reach, or reaches twice (shared layers have no ω of their own).
    """
    norms, seen = admin_norms(model), set()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(norm: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if name in seen:
                raise ValueError(f"model: {name} runs twice in one forward pass; expected one AdminNorm a sub-layer")
            seen.add(name)
            x, branch = (*arguments, *(options[key] for key in ("x", "branch")[len(arguments) :]))
            visit(name, norm, x, branch)

        return hook

    handles = [norm.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, norm in norms.items()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code would run without the hooks
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name in norms if name not in seen]:
        raise ValueError(f"batch: expected every AdminNorm of the model to run, got none at {', '.join(missed)}")


def variances(norm: AdminNorm, x: Tensor, branch: Tensor, group: Any | None = None) -> tuple[float, float]:
    """Var(ω ⊙ x) and Var(dropout(branch + branch_bias)) over all elements, those on other ranks included.

    The second is the variance that dropout has over all masks, not that of one mask.
    """
    moments = torch.stack([_moments(x, norm.omega, None), _moments(branch, None, norm.branch_bias)])
    if _ranks.number(group) > 1:
        distributed.all_reduce(moments, group=group)
    (count, total, squares), (_, branch_total, branch_squares) = moments.tolist()
    if count == 0:
        raise ValueError("batch: expected activations, got an empty batch")
    kept = 1 - norm.dropout if norm.training else 1.0
    found = squares / count - (total / count) ** 2, branch_squares / kept / count - (branch_total / count) ** 2
    if not all(0 <= value < float("inf") for value in found):
        raise ValueError(f"batch: expected finite activations, got variances {found[0]} and {found[1]} in the model")
    if sum(found) == 0:
        raise ValueError("batch: expected activations that differ, got the same value throughout the model's stream")
    return found


def _moments(value: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Count, sum and sum of squares of scale·value + shift, in float64."""
    rows = value.detach().reshape(-1, value.shape[-1])
    moments = torch.zeros(3, dtype=torch.float64, device=value.device)
    for part in rows.split(max(1, _VALUES_AT_A_TIME // rows.shape[1])):
        part = part.double()
        part = part if scale is None else part * scale
        part = part if shift is None else part + shift
        moments += torch.stack([moments.new_tensor(part.numel()), part.sum(), part.square().sum()])
    return moments


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
