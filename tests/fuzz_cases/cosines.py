"""Measures over pairs of vectors: CosReg, means and maxima of cosines, GOR."""

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast.functional.pairwise import KINDS
from repdeg_fast.reference import cosreg as cosreg_definition
from repdeg_fast.reference import pairwise as pairwise_definition

from .draw import GAP, Given, Problem, doubles, dtypes, matrices, seed, shortest, sizes

smallest_norms = st.sampled_from([1e-12, 1e-12, 1e-12, 2.0])  # some rows are shorter than the last


@st.composite
def cosine_regularization(draw):
    seed(draw)
    dtype = draw(dtypes)
    weight = draw(matrices(draw(sizes), draw(sizes), dtype=dtype, mean=draw(st.sampled_from([0.0, 0.5]))))
    if draw(st.booleans()):
        weight.data[0] = 0
    given, eps = draw(st.sampled_from([None, "some", "few"])), draw(eps_for([weight]))
    p = torch.rand(len(weight), dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    if given == "few":  # the others weigh nothing
        p[1:] = p[1:].where(torch.rand(len(p) - 1) < 0.3, 0)
    p = p if given else None
    in_place, coefficient = draw(st.booleans()), draw(st.sampled_from([1.0, -0.5, 3.0]))
    before = draw(matrices(*weight.shape, dtype=dtype, scale=draw(st.sampled_from([0.0, 0.5])))).detach()

    def call(weight):
        if not in_place:
            return (repdeg_fast.cosine_regularization(weight, row_weight=p, eps=eps),)
        leaf, there = weight.detach().requires_grad_(), before.double().clone()
        leaf.grad = before
        value = repdeg_fast.add_cosine_regularization_(leaf, coefficient, row_weight=p, eps=eps)
        added = (before.double() - there) / coefficient
        before.copy_(there)
        return (Given.apply(value, weight, added.to(weight.dtype)),)

    def definition(weight):
        row_weight = p if p is None else p.to(weight.dtype)
        return (cosreg_definition.cosine_regularization(weight, row_weight, eps),)

    options = {"row_weight": given, "in_place": in_place and coefficient, "eps": eps, "before": before.stride()}
    return Problem([weight], call, definition, options, steep=2 * shortest([weight]))


@st.composite
def eps_for(draw, leaves):
    """A smallest norm that no row's norm is near."""
    eps = draw(smallest_norms)
    norms = torch.cat([leaf.detach().double().norm(dim=1) for leaf in leaves])
    assume(((norms - eps).abs() > GAP)[norms > 0].all())
    return eps


@st.composite
def pairwise(draw):
    leaves = draw(vectors())
    kind, options = draw(st.sampled_from([*KINDS, "max"])), {"eps": draw(eps_for(leaves))}
    options["skip_diagonal"] = len(leaves) > 1 and draw(st.booleans())
    if kind == "max":
        assume(len(leaves[-1]) > 1)
        return _nearest(leaves, options)
    options |= {"kind": kind, "margin": 0.0625, "temperature": draw(st.sampled_from([0.02, 0.05, 0.25, 2.0]))}
    if kind in ("abs", "relu"):
        cosines = _cosines(doubles(leaves), options["eps"])
        assume(((cosines - (options["margin"] if kind == "relu" else 0)).abs() > GAP).logical_or(cosines == 0).all())
    return Problem(
        leaves,
        lambda *sets: (repdeg_fast.pairwise_cosine(*sets, **options),),
        lambda *sets: (pairwise_definition.pairwise_cosine(*sets, **options),),
        options,
        gradients=leaves[0].dtype.itemsize > 2 or kind not in ("abs", "relu"),
        steep=max(20, 1 / options["temperature"]) * shortest(leaves),
    )


@st.composite
def vectors(draw):
    """One set or two of one width, perhaps with a zero row."""
    seed(draw)
    dtype, width = draw(dtypes), draw(sizes)
    leaves = [draw(matrices(draw(sizes), width, dtype=dtype, mean=0.3)) for _ in range(1 + draw(st.booleans()))]
    if len(leaves[0]) > 2 and draw(st.booleans()):
        leaves[0].data[1] = 0
    return leaves


def _nearest(leaves, options):
    best = _cosines(doubles(leaves), **options).topk(2, dim=1).values
    apart = bool((best[:, 0] - best[:, 1] > GAP).all())
    return Problem(
        leaves,
        lambda *sets: (repdeg_fast.pairwise_max_cosine(*sets, **options).values,),
        lambda *sets: (pairwise_definition.pairwise_max_cosine(*sets, **options)[0],),
        options,
        gradients=apart and leaves[0].dtype.itemsize > 2,
        steep=shortest(leaves),
    )


def _cosines(sets, eps, skip_diagonal=False):
    x, y = sets[0], sets[-1]
    cosines = F.normalize(x, dim=1, eps=eps) @ F.normalize(y, dim=1, eps=eps).T
    return cosines.fill_diagonal_(-2) if len(sets) == 1 or skip_diagonal else cosines


@st.composite
def orthogonal_regularization(draw):
    leaves = draw(vectors())
    options = {
        "mean_weight": draw(st.sampled_from([0.0, 1.0, 0.5])),
        "second_moment_weight": draw(st.sampled_from([0.0, 1.0, 2.0])),
        "reduction": draw(st.sampled_from(["sum", "none"])),
    }

    def moments(*sets):
        one = {"skip_diagonal": len(sets) > 1}
        return (pairwise_definition.pairwise_cosine(*sets, kind=kind, **one) for kind in ("mean", "square"))

    def definition(*sets):
        first, second = moments(*sets)
        terms = options["mean_weight"] * first**2, options["second_moment_weight"] * (second - 1 / width).relu()
        return (sum(terms) if options["reduction"] == "sum" else torch.stack(terms),)

    width = leaves[0].shape[1]
    _, second = moments(*doubles(leaves))
    assume(abs(second - 1 / width) > (GAP if leaves[0].dtype.itemsize > 2 else 0.02))
    call = lambda *sets: (repdeg_fast.global_orthogonal_regularization(*sets, **options),)  # noqa: E731
    return Problem(leaves, call, definition, options, steep=8 * shortest(leaves))
