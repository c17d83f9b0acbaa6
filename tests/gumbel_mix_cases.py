"""What the tests of Gumbel mixing share."""

import copy
import math

import torch

from repdeg_fast import gumbel_mix
from repdeg_fast._mixture import mix
from repdeg_fast.reference import gumbel_mix as definition

SEED = 1234


class Problem:
    """Inputs of one call, and what the published formula makes of them."""

    def __init__(self, shape, dtype=torch.float32, device="cpu", bias=True, tied=False, scale=2.0):
        heads, rows, vocabulary, width, embedding_width = shape
        generator = torch.Generator().manual_seed(rows * vocabulary)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

        self.hidden_states = normal(heads, rows, width)
        self.mixture_logits = normal(rows, heads).requires_grad_()
        self.weight = normal(vocabulary, width, scale=scale / math.sqrt(width))
        self.bias = normal(vocabulary) if bias else None
        self.embedding = self.weight if tied else normal(vocabulary, embedding_width)
        self.embedding.requires_grad_()
        self.upstream = normal(rows, self.embedding.shape[1])

    def tensors(self):
        return (self.hidden_states, self.mixture_logits, self.weight, self.bias, self.embedding)

    def first_rows(self, rows):
        """The same with fewer rows. Noise belongs to (row, token): the others change nothing."""
        few = copy.copy(self)
        few.hidden_states, few.upstream = self.hidden_states[:, :rows], self.upstream[:rows]
        few.mixture_logits = self.mixture_logits.detach()[:rows].requires_grad_()
        return few

    def run(self, **options):
        """Token ids, embeddings, gradients of the mixture logits and of the embedding."""
        options = {"seed": SEED, "gradient_scale": 1.0} | options
        token_ids, embeddings = gumbel_mix(*self.tensors(), **options)
        leaves = (self.mixture_logits, self.embedding)
        return token_ids, embeddings, *torch.autograd.grad((embeddings * self.upstream).sum(), leaves)

    def expected(self, hard, temperature, dtype=torch.float64, order=slice(None)):
        """The same by the formula as published, K logits mixed, in ``dtype``; the width is summed over in ``order``.
        16-bit hidden states are mixed and rounded first, as every backend does, and a wider weight is rounded to their
        dtype: else the comparison would be with other logits."""
        hidden, logits, weight, bias, embedding = (
            None if tensor is None else tensor.detach().cpu().double() for tensor in self.tensors()
        )
        if self.hidden_states.element_size() < 4:
            hidden = hidden + (
                mix(self.hidden_states, self.mixture_logits.detach()).cpu().double() - mix(hidden, logits)
            )
            weight = weight.to(self.hidden_states.dtype)
        logits, embedding = logits.to(dtype).requires_grad_(), embedding.to(dtype).requires_grad_()
        hidden, weight, upstream = (
            hidden[..., order].to(dtype),
            weight[:, order].to(dtype),
            self.upstream.cpu().to(dtype),
        )
        if bias is not None:  # finite: autograd multiplies an excluded token's logit by its gradient, which is 0
            bias = bias.clamp_min(-1e30).to(dtype)
        seed = torch.tensor([SEED])
        token_ids, value = definition.gumbel_mix(hidden, logits, weight, bias, embedding, seed, temperature, hard)
        return token_ids, value, *torch.autograd.grad((value * upstream).sum(), (logits, embedding))
