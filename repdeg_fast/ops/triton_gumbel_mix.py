"""The Triton kernels of Gumbel mixing in the form of its contract. Imported where Triton is to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repdeg_fast.contracts.gumbel_mix import Drawn, Estimator, Gradients, HeadLogits, Heads, Noise, Projection, Wanted
from repdeg_fast.ops.chunked_vocabulary import ChunkedVocabulary, plain, with_plain_bias
from repdeg_fast.reference.gumbel_mix import embed_backward

if TYPE_CHECKING:
    from triton_kernels import gumbel_candidates, gumbel_mix
else:
    from repdeg_fast.triton_kernels import gumbel_candidates, gumbel_mix


class Kernels(ChunkedVocabulary):
    """Where τ is so small that a few tokens are all that matters, they are kept from a look at logits that are there,
    and no product is made again for their gradient."""

    def __init__(self) -> None:
        super().__init__(gumbel_mix)

    def room(self, dtype: torch.dtype, temperature: float | None) -> int:
        none = temperature is not None and gumbel_candidates.reach(dtype, temperature) is None
        return 0 if none else gumbel_candidates.KEPT

    def sample_logits(self, drawn: Drawn, block: HeadLogits, noise: Noise, candidates: Tensor | None = None) -> None:
        if candidates is None:
            super().sample_logits(drawn, block, noise)
        else:
            gumbel_candidates.draw(drawn, candidates, block._replace(bias=plain(block.bias)), noise)

    def backward(
        self, grad_values: Tensor, heads: Heads, projection: Projection, embedding: Tensor, drawn: Drawn, noise: Noise,
        estimator: Estimator, wanted: Wanted, candidates: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        if candidates is None or not wanted.mixture_logits:
            return super().backward(grad_values, heads, projection, embedding, drawn, noise, estimator, wanted)
        grad_mixture = gumbel_candidates.mixture_gradient(
            grad_values, heads, with_plain_bias(projection), embedding, drawn, candidates, noise,
            estimator.gradient_scale,
        )  # fmt: skip
        return Gradients(grad_mixture, embed_backward(grad_values, embedding, drawn) if wanted.embedding else None)


kernels = Kernels()
