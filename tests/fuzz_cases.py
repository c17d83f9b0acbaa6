"""Problems for the fuzz tests: what hypothesis draws of each operation, and what its definition makes of it.

A problem has leaves, a call of ours, and the definition, which takes the leaves in any floating dtype. Values come from
a drawn seed, so that hypothesis shrinks shapes and options, not numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import contrastive_cases
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import repdeg_fast
from repdeg_fast.contracts.contrastive import DIRECTIONS, HARDNESS_MODES
from repdeg_fast.functional.pairwise import KINDS
from repdeg_fast.reference import admin_norm as admin_definition
from repdeg_fast.reference import cosreg as cosreg_definition
from repdeg_fast.reference import gumbel_mix as gumbel_definition
from repdeg_fast.reference import pairwise as pairwise_definition
from repdeg_fast.reference import philox

Outputs = tuple[Tensor, ...]
GAP = 1e-4  # what is decided by a comparison is compared where values are further apart


class Problem(NamedTuple):
    """``call`` and ``definition`` take the leaves and return what gradients are taken of."""

    leaves: list[Tensor]
    call: Callable[..., Outputs]
    definition: Callable[..., Outputs]
    options: dict[str, object]
    gradients: bool = True  # whether they are compared, too
    steep: float = 1.0  # how much an error in a product grows on its way to a gradient

    def __repr__(self):
        leaves = ", ".join(f"{tuple(t.shape)}/{t.stride()} {str(t.dtype)[6:]}" for t in self.leaves)
        return f"<{leaves}; {self.options}>"


dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
wide = st.sampled_from([torch.float32, torch.float64])
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 100, 129]))
layouts = st.sampled_from(["contiguous", "transposed", "spread", "part", "shifted"])


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


@st.composite
def linear_cross_entropy(draw):
    seed(draw)
    dtype, heads = draw(dtypes), draw(st.sampled_from([None, None, 1, 3]))
    rows, vocabulary, width = draw(st.one_of(st.just(0), sizes)), draw(sizes), draw(sizes)
    scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
    shape = (rows, width) if heads is None else (heads, rows, width)
    leaves = [draw(matrices(*shape, dtype=dtype)), draw(matrices(vocabulary, width, dtype=dtype, scale=scale))]
    if draw(st.booleans()):
        leaves.append(draw(matrices(vocabulary, dtype=dtype)))
        if vocabulary > 2 and draw(st.booleans()):  # a class that no target names is taken out
            leaves[2].data[0] = -torch.inf
    target = torch.randint(int(vocabulary > 2), vocabulary, (rows,))
    target[torch.rand(rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    target = target.to(draw(st.sampled_from([torch.int64, torch.int32])))
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))
        if len(leaves) < 3 or leaves[2].isfinite().all()
        else 0.0,
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "strategy": draw(st.sampled_from(["auto", "chunked", "streaming"])),
        "padding_idx": draw(st.sampled_from([None, -1])),
        "lse_square_scale": draw(st.sampled_from([0.0, 0.0, 1e-2])),
    }
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(vocabulary, dtype=torch.float64).add(0.1).to(dtype)
    lse = heads is None and draw(st.booleans())

    def call(hidden, weight, bias=None):
        if heads is not None:
            return (repdeg_fast.multi_layer_mlm_loss(hidden, weight, target, bias, **options),)
        return tuple(repdeg_fast.linear_cross_entropy(hidden, weight, target, bias, **options, return_lse=True))[
            : 1 + lse
        ]

    def definition(hidden, weight, bias=None):
        if options["padding_idx"] is not None:
            weight = torch.cat([weight[:-1], weight[-1:].detach()])
        losses, lses = zip(*(one(h, weight, bias) for h in (hidden[None] if heads is None else hidden)), strict=True)
        return (torch.stack(losses) if heads is not None else losses[0], lses[0])[: 1 + lse]

    def one(hidden, weight, bias):
        z = F.linear(hidden, weight, bias)
        z = z if z.dtype == torch.float64 else z.float()
        if options["softcap"]:
            z = options["softcap"] * torch.tanh(z / options["softcap"])
        class_weight = options.get("class_weight")
        if class_weight is not None:
            class_weight = class_weight.to(z.dtype)
        smoothing = {"label_smoothing": options["label_smoothing"]}
        each = F.cross_entropy(z, target.long(), class_weight, reduction="none", **smoothing)
        counts = target != -100
        of_target = counts if class_weight is None else class_weight[target.long() * counts] * counts
        squares = options["lse_square_scale"] * z.logsumexp(1).square() * counts
        total = of_target.sum() if counts.any() else 1
        mean = each.sum() / total + squares.sum() / counts.sum().clamp_min(1)
        loss = {"none": each + squares, "sum": (each + squares).sum(), "mean": mean}[options["reduction"]]
        return loss, z.logsumexp(1)

    return Problem(leaves, call, definition, options, steep=max(1.0, scale) * leaves[0].shape[:-1].numel() ** 0.5)


@st.composite
def contrastive(draw):
    seed(draw)
    dtype, width = draw(dtypes), draw(sizes)
    n, hard = draw(st.integers(2, 20)), draw(st.integers(0, 2))
    more = draw(st.sets(st.sampled_from(DIRECTIONS[1:])))
    same_type = {"query_to_query", "doc_to_doc"} & more
    options = {
        "scale": draw(st.sampled_from([1.0, 20.0])),
        "similarity": draw(st.sampled_from(["cosine", "dot"])),
        "directions": (DIRECTIONS[0], *sorted(more)),
        "partition_mode": "joint" if same_type else draw(st.sampled_from(["joint", "per_direction"])),
        "hardness_mode": draw(st.sampled_from([None, *HARDNESS_MODES])),
        "hardness_strength": draw(st.sampled_from([0.0, 3.0])),
    }
    if draw(st.booleans()):
        options["query_ids"] = torch.randint(0, 2 * n, (n,))
    if draw(st.booleans()):
        options["document_ids"] = torch.randint(0, 4 * n, (n * (1 + hard),))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    leaves = [draw(matrices(n, width, dtype=dtype)), draw(matrices(n * (1 + hard), width, dtype=dtype))]
    if options["similarity"] == "dot":  # 16 bits do not hold larger logits to what is left of them in a softmax
        options["scale"] = min(
            1.0, 8 / max((x @ y.T).abs().max().item() for x in doubles(leaves) for y in doubles(leaves))
        )

    def definition(queries, documents):
        rows = contrastive_cases.definition(queries, documents, **options)
        return (rows if reduction == "none" else getattr(rows, reduction)(),)

    def call(queries, documents):
        return (repdeg_fast.contrastive_loss(queries, documents, **options, reduction=reduction),)

    return Problem(leaves, call, definition, {**options, "reduction": reduction}, steep=20 * shortest(leaves))


@st.composite
def span_pairs(draw):
    seed(draw)
    leaf = draw(matrices(2 * draw(st.integers(1, 30)), draw(sizes), dtype=draw(dtypes), scale=0.5))

    def definition(x):
        scores = (x @ x.T).fill_diagonal_(-torch.inf)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return (F.cross_entropy(scores, torch.arange(len(x)) ^ 1),)

    return Problem([leaf], lambda x: (repdeg_fast.span_pair_loss(x),), definition, {}, steep=4.0)


@st.composite
def cosine_regularization(draw):
    seed(draw)
    weight = draw(matrices(draw(sizes), draw(sizes), dtype=draw(dtypes), mean=draw(st.sampled_from([0.0, 0.5]))))
    if draw(st.booleans()):
        weight.data[0] = 0
    given = draw(st.booleans())
    p = torch.rand(len(weight), dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32) + 0.1
    p = p if given else None
    in_place = draw(st.booleans())

    def call(weight):
        if not in_place:
            return (repdeg_fast.cosine_regularization(weight, row_weight=p),)
        leaf = weight.detach().requires_grad_()
        return _Given.apply(weight, repdeg_fast.add_cosine_regularization_(leaf, 1.0, row_weight=p), leaf.grad)

    def definition(weight):
        return (cosreg_definition.cosine_regularization(weight, p if p is None else p.to(weight.dtype)),)

    return Problem([weight], call, definition, {"row_weight": given, "in_place": in_place}, steep=shortest([weight]))


class _Given(torch.autograd.Function):
    """A value whose gradient is known."""

    @staticmethod
    def forward(ctx, leaf, value, gradient):
        ctx.save_for_backward(gradient)
        return (value.clone(),)

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


@st.composite
def pairwise(draw):
    seed(draw)
    dtype, width, two = draw(dtypes), draw(sizes), draw(st.booleans())
    leaves = [draw(matrices(draw(sizes), width, dtype=dtype, mean=0.3)) for _ in range(1 + two)]
    if len(leaves[0]) > 2 and draw(st.booleans()):
        leaves[0].data[1] = 0
    kind = draw(st.sampled_from([*KINDS, "max"]))
    options = {"skip_diagonal": two and draw(st.booleans())}
    if kind == "max":
        assume(len(leaves[-1]) > 1)
        return _nearest(leaves, options, dtype)
    options |= {"kind": kind, "margin": 0.0625, "temperature": draw(st.sampled_from([0.05, 0.25, 2.0]))}
    if kind in ("abs", "relu"):
        cosines = _cosines(doubles(leaves))
        assume(((cosines - (options["margin"] if kind == "relu" else 0)).abs() > GAP).logical_or(cosines == 0).all())
    return Problem(
        leaves,
        lambda *sets: (repdeg_fast.pairwise_cosine(*sets, **options),),
        lambda *sets: (pairwise_definition.pairwise_cosine(*sets, **options),),
        options,
        gradients=dtype.itemsize > 2 or kind not in ("abs", "relu"),
        steep=20 * shortest(leaves),
    )


def _nearest(leaves, options, dtype):
    best = _cosines(doubles(leaves), **options).topk(2, dim=1).values
    apart = bool((best[:, 0] - best[:, 1] > GAP).all())
    return Problem(
        leaves,
        lambda *sets: (repdeg_fast.pairwise_max_cosine(*sets, **options).values,),
        lambda *sets: (pairwise_definition.pairwise_max_cosine(*sets, **options)[0],),
        options,
        gradients=apart and dtype.itemsize > 2,
        steep=shortest(leaves),
    )


def _cosines(sets, skip_diagonal=False):
    x, y = sets[0], sets[-1]
    cosines = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    return cosines.fill_diagonal_(-2) if len(sets) == 1 or skip_diagonal else cosines


@st.composite
def admin_norm(draw):
    seed(draw)
    dtype, rows, width = draw(dtypes), draw(sizes), draw(st.integers(3, 140))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [draw(matrices(rows, width, dtype=dtype, mean=draw(st.sampled_from([0.0, 3.0])))) for _ in range(2)]
    names = [name for name in ("omega", "weight", "bias", "branch_bias") if draw(st.booleans())]
    for name in names:
        leaf = draw(matrices(width, dtype=parameters))
        if name in ("omega", "weight"):  # away from zero, where y says nothing of what was normalized
            leaf.data.copy_(leaf.sign() * (leaf.abs() + 0.5))
        leaves.append(leaf)
    dropout, given = draw(st.sampled_from([0.0, 0.3])), draw(st.integers(-(2**63), 2**64 - 1))
    options = {"norm": draw(st.sampled_from(["layer", "rms"])), "save": draw(st.sampled_from(["auto", "input"]))}
    options["eps"] = draw(st.sampled_from([1e-5, 1e-12]))

    def call(x, branch, *rest):
        rest = dict(zip(names, rest, strict=True))
        return (repdeg_fast.admin_norm(x, branch, **rest, **options, dropout=dropout, seed=given),)

    def definition(x, branch, *rest):
        keep = None
        if dropout:
            signed = given if given < 2**63 else given - 2**64
            mask = philox.dropout_mask(torch.tensor([signed]), range(rows), range(width), dropout)
            keep = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32) / (1 - dropout)
        rest, chosen = dict(zip(names, rest, strict=True)), {k: v for k, v in options.items() if k != "save"}
        return (admin_definition.admin_norm(x, branch, **rest, keep=keep, **chosen),)

    return Problem(leaves, call, definition, {**options, "parameters": names, "dropout": dropout}, steep=8.0)


@st.composite
def gumbel_mix(draw):
    seed(draw)
    dtype, (heads, rows, vocabulary, width) = draw(wide), (draw(st.integers(1, 4)), *(draw(sizes) for _ in range(3)))
    hidden, weight = (
        torch.randn(heads, rows, width, dtype=dtype),
        torch.randn(vocabulary, width, dtype=dtype) / width**0.5,
    )
    bias = torch.randn(vocabulary, dtype=dtype) if draw(st.booleans()) else None
    leaves = [draw(matrices(rows, heads, dtype=dtype)), draw(matrices(vocabulary, draw(sizes), dtype=dtype))]
    options = {"hard": draw(st.booleans()), "temperature": draw(st.sampled_from([0.1, 0.3, 2.0]))}
    given = draw(st.integers(0, 2**63 - 1))
    both = draw(st.booleans()) and options["hard"]

    def call(logits, embedding):
        if both:  # with the losses of the heads in one sweep
            target = torch.zeros(rows, dtype=torch.int64)
            return repdeg_fast.mlm_losses_and_sample(
                hidden, logits, weight, target, bias, embedding, temperature=options["temperature"], gradient_scale=1.0,
                seed=given, strategy="chunked",
            )[2:]  # fmt: skip
        mixed = repdeg_fast.gumbel_mix(
            hidden, logits, weight, bias, embedding, **options, gradient_scale=1.0, seed=given
        )
        return mixed[1:]

    def definition(logits, embedding):
        mixed = [None if x is None else x.to(logits.dtype) for x in (hidden, weight, bias)]
        arguments = (mixed[0], logits, mixed[1], mixed[2], embedding, torch.tensor([given]))
        return gumbel_definition.gumbel_mix(*arguments, options["temperature"], options["hard"])[1:]

    z = torch.einsum("mk,kmv->mv", doubles(leaves)[0].softmax(1), hidden.double() @ weight.double().T)
    z = z + philox.gumbel(torch.tensor([given]), range(rows), range(vocabulary), dtype=torch.float64)
    z = z if bias is None else z + bias
    if options["hard"] and vocabulary > 1:
        best = z.topk(2, dim=1).values
        assume((best[:, 0] - best[:, 1]).min() > GAP)
    return Problem(leaves, call, definition, {**options, "with losses": both}, steep=10.0)


OPERATIONS = {
    "admin_norm": admin_norm,
    "contrastive_loss": contrastive,
    "cosine_regularization": cosine_regularization,
    "gumbel_mix": gumbel_mix,
    "linear_cross_entropy": linear_cross_entropy,
    "pairwise_cosine": pairwise,
    "span_pair_loss": span_pairs,
}
