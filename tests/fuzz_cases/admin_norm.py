"""ADMIN's residual block, at ordinary and at extreme ranges."""

import torch
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast.reference import admin_norm as admin_definition
from repdeg_fast.reference import philox

from .draw import Problem, dtypes, matrices, seed, sizes

PARAMETERS = ("omega", "weight", "bias", "branch_bias")


@st.composite
def admin_norm(draw):
    """Inputs are scaled by a power of two inside the call, and eps with them: y is the same, bit by bit, and so are
    gradients in what was there before. What overflows or vanishes on the way shows."""
    seed(draw)
    dtype, rows, width = draw(dtypes), draw(sizes), draw(st.integers(3, 140))
    far = [0.0, 3.0] if dtype.itemsize == 2 else [0.0, 3.0, 300.0]  # in 16 bits nothing would be left of a row
    shape, means = (*draw(st.sampled_from([(), (2,)])), rows, width), [draw(st.sampled_from(far)) for _ in range(2)]
    leaves = [draw(matrices(*shape, dtype=dtype, mean=mean)) for mean in means]
    names = [name for name in PARAMETERS if draw(st.booleans())]
    # one ω of rows far from zero: a sum of terms that cancel, of which plain PyTorch keeps two digits more
    leaves += [draw(parameters(name, width, dtype, one=name == "omega" and max(means) < 300)) for name in names]
    exponent = draw(st.integers(*{torch.float16: (-4, 4)}.get(dtype, (-40, 40))))
    dropout, given = draw(st.sampled_from([0.0, 0.3, 0.9])), draw(st.integers(-(2**63), 2**64 - 1))
    options = {"norm": draw(st.sampled_from(["layer", "rms"])), "save": draw(st.sampled_from(["auto", "input"]))}
    eps, scale = draw(st.sampled_from([1e-5, 1e-12, 1.0])), 2.0**exponent

    def call(x, branch, *rest):
        rest = dict(zip(names, rest, strict=True))
        if "branch_bias" in rest:
            rest["branch_bias"] = rest["branch_bias"] * scale
        inputs = (x * scale, branch * scale)
        y = repdeg_fast.admin_norm(*inputs, **rest, **options, eps=eps * scale**2, dropout=dropout, seed=given)
        return (y,)

    def definition(x, branch, *rest):
        keep = None
        if dropout:
            signed = given if given < 2**63 else given - 2**64
            mask = philox.dropout_mask(torch.tensor([signed]), range(x.shape[:-1].numel()), range(width), dropout)
            keep = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32) / (1 - dropout)
        rest = dict(zip(names, rest, strict=True))
        flat = (x.flatten(0, -2), branch.flatten(0, -2))
        y = admin_definition.admin_norm(*flat, **rest, keep=keep, norm=options["norm"], eps=eps)
        return (y.view(shape),)

    steep = 8.0 * max(1.0, *means)  # far from zero a row is rounded at its distance
    if dtype.itemsize == 2:  # sums over rows, whose terms are made of y as it was rounded
        steep *= (leaves[0].numel() / width) ** 0.5
    if "weight" in names:
        steep *= max(1.0, leaves[2 + names.index("weight")].abs().max().item())
    if "omega" in names and leaves[2].numel() == 1:  # the sum of terms of either sign over all values of x
        steep *= max(1.0, leaves[0].norm().item())
    shown = {**options, "eps": eps, "scale": exponent, "parameters": names, "dropout": dropout}
    return Problem(leaves, call, definition, shown, steep=steep)


@st.composite
def parameters(draw, name, width, dtype, one):
    """(d,), or ``one`` value for all columns."""
    one = one and draw(st.booleans())
    leaf = draw(matrices(1 if one else width, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    if name in ("omega", "weight"):  # away from zero, where y says nothing of what was normalized
        size = 2.0 ** draw(st.sampled_from([0, 0, -10, 10])) if dtype != torch.float16 else 1.0
        leaf.data.copy_(leaf.sign() * (leaf.abs() + 0.5) * size)
    return leaf
