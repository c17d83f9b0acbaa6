"""What all problems are made of.

A problem has leaves, a call of ours, and the definition, which takes the leaves in any floating dtype. Values come from
a drawn seed, so that hypothesis shrinks shapes and options, not numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Outputs = tuple[Tensor, ...]
GAP = 1e-4  # what is decided by a comparison is compared where values are further apart


class Problem(NamedTuple):
    """``call`` and ``definition`` take the leaves and return what gradients are taken of, where it has any."""

    leaves: list[Tensor]
    call: Callable[..., Outputs]
    definition: Callable[..., Outputs]
    options: dict[str, object]
    gradients: bool = True  # whether they are compared, too
    steep: float = 1.0  # how much an error in a product grows on its way to a gradient
    precision: torch.dtype | None = None  # what is computed in, where that is not the dtype of a leaf: autocast's

    def __repr__(self):
        leaves = ", ".join(f"{tuple(t.shape)}/{t.stride()} {str(t.dtype)[6:]}" for t in self.leaves)
        return f"<{leaves}; {self.options}; {self.precision}>"


dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
wide = st.sampled_from([torch.float32, torch.float64])
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 100, 129]))
layouts = st.sampled_from(["contiguous", "transposed", "spread", "part", "shifted"])
reductions = st.sampled_from(["mean", "sum", "none"])


@st.composite
def matrices(draw, *shape, dtype, scale=1.0, mean=0.0):
    """A leaf of that shape, laid out in memory in one of several ways."""
    values = (torch.randn(shape, dtype=torch.float64) * scale + mean).to(dtype)
    layout = draw(layouts)
    if layout == "transposed":
        values = values.mT.contiguous().mT if len(shape) > 1 else values
    elif layout == "spread":  # unit stride nowhere
        values = values.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "part":  # rows of a wider matrix
        values = F.pad(values, (0, 3))[..., : shape[-1]]
    elif layout == "shifted":  # not on 16 bytes
        values = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)
    return values.requires_grad_()


def seed(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))


def shortest(leaves):
    """1/‖x‖ of the shortest row, which its gradient has as a factor; at least 1."""
    norms = torch.cat([leaf.detach().double().norm(dim=1) for leaf in leaves])
    return max([1.0, *(1 / norms[norms > 0]).tolist()])


def doubles(leaves):
    return [leaf.detach().double() for leaf in leaves]


def between(values, quantile, width):
    """A number in the middle of two of ``values`` that are further apart than ``width``; ``None`` if no two are."""
    values = values.flatten().sort().values
    wide_apart = (values.diff() > width).nonzero()[:, 0]
    if len(wide_apart) == 0:
        return None
    at = wide_apart[int(quantile * (len(wide_apart) - 1))]
    return float((values[at] + values[at + 1]) / 2)


class Given(torch.autograd.Function):
    """A value whose gradients are known: ``Given.apply(value, *leaves, *gradients)``."""

    @staticmethod
    def forward(ctx, value, *leaves_and_gradients):
        ctx.save_for_backward(*leaves_and_gradients[len(leaves_and_gradients) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        gradients = ctx.saved_tensors
        return None, *[upstream.to(g.dtype) * g for g in gradients], *[None] * len(gradients)
