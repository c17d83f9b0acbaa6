"""Gumbel mixing a chunk of the vocabulary at a time: the contract's ``ChunkKernels`` in PyTorch, as far as ranks that
have a part of the vocabulary each need them. Mathematics: :mod:`repdeg_fast.reference.gumbel_mix`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repdeg_fast._mixture import mix as _mix
from repdeg_fast.contracts.gumbel_mix import Drawn, Heads, LogitChunk, Noise, Origin, RowState, Sums
from repdeg_fast.reference import philox

Gumbel = Callable[[Tensor, range, range], Tensor]  # of a seed, rows and columns: (rows, columns)


class Chunks:
    """``gumbel``: who makes the noise."""

    def __init__(self, gumbel: Gumbel | None = None) -> None:
        self._gumbel = gumbel

    def mix(self, heads: Heads) -> Tensor:
        return _mix(*heads)

    def look(self, state: RowState, chunk: LogitChunk, mixture_logits: None, noise: Noise) -> None:
        """See the contract; of logits that are mixed already."""
        s, (first, _) = self._perturbed(chunk, noise), chunk.columns
        here, index = s.masked_fill(s.isnan(), -torch.inf).max(dim=1)
        state.token_ids.copy_(torch.where(here > state.most, first + index, state.token_ids))
        new = torch.maximum(state.most, here)
        zero = new.masked_fill(new == -torch.inf, 0)
        state.total.mul_(((state.most - zero) / noise.temperature).exp())
        state.total.add_(((s - zero[:, None]) / noise.temperature).exp().sum(dim=1))
        state.most.copy_(new)

    def weights(
        self, y: Tensor, weighted: Tensor | None, sums: Sums, chunk: LogitChunk, products: Tensor | None,
        origin: Origin, drawn: Drawn, noise: Noise,
    ) -> None:  # fmt: skip
        """See the contract."""
        s, (first, _) = self._perturbed(chunk, noise), chunk.columns
        exponent = ((s - origin.perturbed[:, None]) / noise.temperature).clamp_max(0)
        is_drawn = torch.arange(first, first + s.shape[1], device=s.device) == drawn.token_ids[:, None]
        values = exponent.masked_fill_(is_drawn, 0).exp_() * drawn.peak[:, None]
        of_products = None
        if weighted is not None and products is not None and origin.products is not None and sums.delta is not None:
            of_products = values.to(y.dtype) * (products - origin.products[:, None])
            sums.delta.add_(of_products.sum(dim=1))
        sums.total.add_(values.sum(dim=1))
        y.copy_(values)
        if weighted is not None and of_products is not None:
            weighted.copy_(of_products)

    def _perturbed(self, chunk: LogitChunk, noise: Noise) -> Tensor:
        (logits,), bias, (first, _), first_row = chunk
        m, width = logits.shape
        rows = range(noise.first_row + first_row, noise.first_row + first_row + m)
        columns = range(first, first + width)
        if self._gumbel is None or logits.dtype == torch.float64:
            g = philox.gumbel(noise.seed, rows, columns, dtype=logits.dtype)
        else:
            g = self._gumbel(noise.seed, rows, columns)
        s = logits + g
        return s if bias is None else s + bias[first : first + width]
