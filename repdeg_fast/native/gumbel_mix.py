"""Gumbel mixing's native kernels: csrc/cpu/gumbel_mix*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast.contracts.gumbel_mix import (
    Drawn,
    Estimator,
    Gradients,
    HeadLogits,
    Heads,
    Noise,
    Projection,
    Wanted,
)
from repdeg_fast.native import Namespace, products
from repdeg_fast.reference.philox import GUMBEL_STREAM


class Kernels:
    def __init__(self, operators: Namespace) -> None:
        self._operators = operators
        self._forward = operators.gumbel_mix_forward.default
        self._sample_logits = operators.gumbel_mix_sample_logits.default
        self._embed = operators.gumbel_mix_embed.default
        self._backward = operators.gumbel_mix_backward.default

    def forward(
        self, heads: Heads, projection: Projection, embedding: Tensor, noise: Noise, *, hard: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        products.settle(self._operators)
        values, token_ids, peak = self._forward(*heads, *projection, embedding, *noise, hard)
        return values, token_ids, peak

    def room(self, dtype: torch.dtype, temperature: float | None) -> int:
        return 0

    def sample_logits(self, drawn: Drawn, block: HeadLogits, noise: Noise, candidates: Tensor | None = None) -> None:
        logits, mixture_logits, bias, first_row = block
        seed, temperature, first = noise
        self._sample_logits(*drawn, logits, mixture_logits, bias, seed, temperature, first + first_row)

    def gumbel(self, seed: Tensor, rows: range, columns: range) -> Tensor:
        """Noise (rows, columns) in fp32, as the kernels make it; columns from a multiple of 4 on."""
        first, size = (rows.start, len(rows)), (columns.start // 4, len(columns), GUMBEL_STREAM)
        noise: Tensor = self._operators.philox_gumbel.default(seed, *first, *size)
        return noise

    def embed(self, embedding: Tensor, drawn: Drawn) -> Tensor:
        values: Tensor = self._embed(embedding, *drawn)
        return values

    def backward(
        self, grad_values: Tensor, heads: Heads, projection: Projection, embedding: Tensor, drawn: Drawn, noise: Noise,
        estimator: Estimator, wanted: Wanted, candidates: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        products.settle(self._operators)
        made = self._backward(grad_values, *heads, *projection, embedding, *drawn, *noise, *estimator, *wanted)
        return Gradients(*[gradient if want else None for gradient, want in zip(made, wanted, strict=True)])
