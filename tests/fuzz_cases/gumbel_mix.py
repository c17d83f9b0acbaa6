"""Samples of a mixture of heads, alone and with the losses of the heads."""

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast.reference import gumbel_mix as gumbel_definition
from repdeg_fast.reference import philox

from .draw import GAP, Problem, doubles, matrices, reductions, seed, sizes, wide

temperatures, scales = st.sampled_from([0.1, 0.3, 2.0]), st.sampled_from([1.0, -1.0, 0.5])
NEVER = -1000.0  # a bias that no noise makes up for; with −∞ the definition's gradients would not be numbers


@st.composite
def gumbel_mix(draw):
    seed(draw)
    dtype, (heads, rows, vocabulary, width) = draw(wide), (draw(st.integers(1, 4)), *(draw(sizes) for _ in range(3)))
    hidden = draw(matrices(heads, rows, width, dtype=dtype)).detach()
    weight = draw(matrices(vocabulary, width, dtype=dtype, scale=width**-0.5)).detach()
    bias = draw(biases(vocabulary, dtype))
    tied = draw(st.booleans())
    leaves = [draw(matrices(rows, heads, dtype=dtype))]
    leaves.append(weight.requires_grad_() if tied else draw(matrices(vocabulary, draw(sizes), dtype=dtype)))
    options = {"hard": draw(st.booleans()), "temperature": draw(temperatures)}
    given, gradient_scale = draw(st.integers(0, 2**63 - 1)), draw(scales)

    def call(logits, embedding):
        return repdeg_fast.gumbel_mix(
            hidden, logits, *((embedding, bias) if tied else (weight.detach(), bias, embedding)), **options,
            gradient_scale=gradient_scale, seed=given,
        )[1:]  # fmt: skip

    def definition(logits, embedding):
        return sample(hidden, logits, weight, bias, embedding, given, gradient_scale, **options)

    if options["hard"]:
        assume_clear(hidden, leaves[0], weight, bias, given)
    shown = {**options, "tied": tied, "gradient_scale": gradient_scale, "bias": bias is not None}
    return Problem(leaves, call, definition, shown, steep=10.0)


@st.composite
def mlm_losses_and_sample(draw):
    """All leaves at once: heads and projection get gradients from the losses alone, the mixture from the sample."""
    seed(draw)
    dtype, (heads, rows, vocabulary, width) = draw(wide), (draw(st.integers(1, 4)), *(draw(sizes) for _ in range(3)))
    leaves = [
        draw(matrices(heads, rows, width, dtype=dtype)),
        draw(matrices(rows, heads, dtype=dtype)),
        draw(matrices(vocabulary, width, dtype=dtype, scale=width**-0.5)),
        draw(matrices(vocabulary, draw(sizes), dtype=dtype)),
    ]
    bias = draw(biases(vocabulary, dtype))
    leaves += [] if bias is None else [bias.requires_grad_()]
    target = torch.randint(int(vocabulary > 1), vocabulary, (rows,))
    target[torch.rand(rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    sampling = {"temperature": draw(temperatures), "gradient_scale": draw(scales)}
    given, padding_idx = draw(st.integers(0, 2**63 - 1)), draw(st.sampled_from([None, -1]))
    loss = {"label_smoothing": draw(st.sampled_from([0.0, 0.1])), "reduction": draw(reductions)}
    options = {"strategy": draw(st.sampled_from(["auto", "chunked", "streaming"])), "padding_idx": padding_idx, **loss}

    def call(hidden, logits, weight, embedding, bias=None):
        losses, _, values = repdeg_fast.mlm_losses_and_sample(
            hidden, logits, weight, target, bias, embedding, **sampling, **options, seed=given
        )
        return losses, values

    def definition(hidden, logits, weight, embedding, bias=None):
        if padding_idx is not None:
            weight, embedding = (torch.cat([t[:-1], t[-1:].detach()]) for t in (weight, embedding))
        smoothing = {"label_smoothing": loss["label_smoothing"]}
        heads = [F.cross_entropy(F.linear(h, weight, bias), target, reduction="none", **smoothing) for h in hidden]
        each = torch.stack(heads)
        values = sample(hidden, logits, weight, bias, embedding, given, hard=True, **sampling)
        counted = {"mean": int((target != -100).sum().clamp_min(1)), "sum": 1, "none": None}[loss["reduction"]]
        return each if counted is None else each.sum(1) / counted, *values

    assume_clear(leaves[0], leaves[1], leaves[2], bias, given)
    return Problem(leaves, call, definition, {**options, **sampling, "bias": bias is not None}, steep=10.0)


@st.composite
def biases(draw, vocabulary, dtype):
    """``None``, or a bias, perhaps with a token that is never drawn."""
    if not draw(st.booleans()):
        return None
    bias = draw(matrices(vocabulary, dtype=dtype)).detach()
    if vocabulary > 1 and draw(st.booleans()):
        bias[0] = NEVER
    return bias


def sample(hidden, logits, weight, bias, embedding, given, gradient_scale, temperature, hard):
    """The value, in the dtype of the logits."""
    hidden, weight, bias = (None if t is None else t.detach().to(logits.dtype) for t in (hidden, weight, bias))
    logits = logits.detach() + gradient_scale * (logits - logits.detach())
    arguments = (hidden, logits, weight, bias, embedding, torch.tensor([given]), temperature, hard)
    return gumbel_definition.gumbel_mix(*arguments)[1:]


def assume_clear(hidden, logits, weight, bias, given):
    """No two tokens are so near to be drawn that rounding decides."""
    hidden, logits, weight = doubles([hidden, logits, weight])
    z = torch.einsum("mk,kmv->mv", logits.softmax(1), hidden @ weight.T)
    z = z + philox.gumbel(torch.tensor([given]), range(z.shape[0]), range(z.shape[1]), dtype=torch.float64)
    z = z if bias is None else z + bias.detach()
    if z.shape[1] > 1:
        best = z.topk(2, dim=1).values
        assume((best[:, 0] - best[:, 1]).min() > GAP)
