"""The linear cross entropy, of one head and of several, and the bound of its gradient filter."""

import contextlib

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import repdeg_fast

from .draw import Problem, between, doubles, dtypes, matrices, reductions, seed, sizes


@st.composite
def linear_cross_entropy(draw):
    seed(draw)
    dtype, heads = draw(dtypes), draw(st.sampled_from([None, None, 1, 3]))
    rows, vocabulary, width = draw(st.one_of(st.just(0), sizes)), draw(sizes), draw(sizes)
    shift = draw(st.sampled_from([0, 0, 1, 2])) if heads is None else 0
    positions = (2, rows) if shift else (rows,)
    scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
    shape = (*positions, width) if heads is None else (heads, rows, width)
    leaves = [draw(matrices(*shape, dtype=dtype)), draw(matrices(vocabulary, width, dtype=dtype, scale=scale))]
    if draw(st.booleans()):
        leaves.append(draw(matrices(vocabulary, dtype=dtype)))
        if vocabulary > 2 and draw(st.booleans()):  # a class that no target names is taken out
            leaves[2].data[0] = -torch.inf
    target = torch.randint(int(vocabulary > 2), vocabulary, positions)
    target[torch.rand(positions) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    target = target.to(draw(st.sampled_from([torch.int64, torch.int32])))
    options = draw(options_of(vocabulary, dtype, smooth=len(leaves) < 3 or bool(leaves[2].isfinite().all())))
    lse, watched = heads is None and draw(st.booleans()), draw(st.booleans())
    autocast = draw(st.booleans()) and dtype.itemsize == 2
    if autocast:  # leaves that are rounded already, so that only what is computed is in 16 bits
        leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    z = logits_of(options, *doubles(leaves))
    if dtype.itemsize > 2 and draw(st.booleans()):
        p = z.log_softmax(-1).flatten()
        threshold = between(p[p > -60], draw(st.floats(0, 1)), 0.01)
        if threshold is not None:
            options["gradient_filter"] = float(torch.tensor(threshold).exp())
    # a class is predicted where no rounding of a logit, in the dtype that is multiplied, makes it another
    best = z.topk(min(2, vocabulary)).values
    largest = best.abs().max().item() if best.numel() else 0.0
    clear = best[..., 0] - best[..., -1] > 8 * torch.finfo(dtype).eps * largest

    def call(hidden, weight, bias=None):
        ask = dict.fromkeys(("return_z_loss", "return_predictions", "return_accuracy"), watched)
        with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
            if heads is None:
                found = repdeg_fast.linear_cross_entropy(
                    hidden, weight, target, bias, **options, **ask, return_lse=lse, shift=shift
                )
            else:
                found = repdeg_fast.multi_layer_mlm_loss(hidden, weight, target, bias, **options, **ask)
        if not watched:
            return found if isinstance(found, tuple) else (found,)
        assert_predicted(found)
        return tuple(t for t in (found.loss, found.lse, found.z_loss) if t is not None)

    def assert_predicted(found):
        kept = (..., slice(0, max(rows - shift, 0)))
        sure = clear[kept]
        assert torch.equal(found.predictions[sure], z.argmax(-1)[kept][sure])
        right, counts = found.predictions == shifted()[kept], shifted()[kept] != -100
        accuracy = (right & counts).flatten(0 if heads is None else 1).sum(-1) / counts.sum().clamp_min(1)
        assert torch.allclose(found.accuracy, accuracy.float())

    def shifted():
        later = target.long().roll(-shift, -1)
        later[..., max(rows - shift, 0) :] = -100
        return later if shift else target.long()

    def definition(hidden, weight, bias=None):
        if options["padding_idx"] is not None:
            weight = torch.cat([weight[:-1], weight[-1:].detach()])
        made = [one(h, weight, bias) for h in (hidden[None] if heads is None else hidden)]
        join = (lambda values: values[0]) if heads is None else torch.stack
        loss, of_rows, z_loss = map(join, zip(*made, strict=True))
        return loss, *[of_rows] * lse, *[z_loss.detach()] * watched

    def one(hidden, weight, bias):
        label = shifted().flatten()
        z, counts = logits_of(options, hidden.flatten(0, -2), weight, bias), label != -100
        if options.get("gradient_filter") and z.requires_grad:
            kept = (z.detach().softmax(1) >= options["gradient_filter"]) | (torch.arange(vocabulary) == label[:, None])
            z.register_hook(lambda gradient: gradient.where(kept, 0))
        class_weight = options.get("class_weight")
        class_weight = class_weight if class_weight is None else class_weight.to(z.dtype)
        smoothing = {"label_smoothing": options["label_smoothing"]}
        each = F.cross_entropy(z, label, class_weight, reduction="none", **smoothing)
        of_target = counts if class_weight is None else class_weight[label * counts] * counts
        squares = options["lse_square_scale"] * z.logsumexp(1).square() * counts
        at = (slice(None),) * (len(positions) - 1) + (slice(0, max(rows - shift, 0)),)
        of_positions = lambda values: values.view(positions)[at]  # noqa: E731
        if options["reduction"] == "none":
            return of_positions(each + squares), of_positions(z.logsumexp(1)), of_positions(squares)
        total, number = of_target.sum() if counts.any() else 1, counts.sum().clamp_min(1)
        if options["reduction"] == "sum":
            total = number = 1
        z_loss = squares.sum() / number
        return each.sum() / total + z_loss, of_positions(z.logsumexp(1)), z_loss

    steep = max(1.0, scale) * leaves[0].shape[:-1].numel() ** 0.5
    if dtype.itemsize == 2 and draw(st.booleans()):  # sums over chunks are rounded, chunk by chunk
        options["accumulate_dtype"], steep = leaves[1].dtype, 4 * steep
    shown = {**options, "heads": heads, "shift": shift, "lse": lse, "watched": watched}
    return Problem(leaves, call, definition, shown, steep=steep, precision=dtype if autocast else None)


@st.composite
def options_of(draw, vocabulary, dtype, smooth):
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])) if smooth else 0.0,
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "reduction": draw(reductions),
        "strategy": draw(st.sampled_from(["auto", "chunked", "streaming"])),
        "padding_idx": draw(st.sampled_from([None, -1])),
        "lse_square_scale": draw(st.sampled_from([0.0, 0.0, 1e-2])),
    }
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(vocabulary, dtype=torch.float64).add(0.1).to(dtype)
    return options


def logits_of(options, hidden, weight, bias=None):
    """With softcap, at least in float32."""
    z = F.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    return options["softcap"] * torch.tanh(z / options["softcap"]) if options["softcap"] else z


@st.composite
def gradient_filter(draw):
    """By how much an error exceeds the bound that the docstring states, of each class and of a row's classes in sum:
    nothing. The logits are the leaf, since the bound is of their gradients."""
    seed(draw)
    dtype, rows, vocabulary = draw(dtypes), draw(sizes), draw(sizes)
    z = draw(matrices(rows, vocabulary, dtype=dtype, scale=draw(st.sampled_from([0.5, 2.0, 6.0]))))
    target = torch.randint(vocabulary, (rows,))
    threshold = draw(st.floats(1e-6, 0.9))
    options = draw(options_of(vocabulary, dtype, smooth=True)) | {"reduction": "sum", "padding_idx": None}
    smoothing, class_weight = options["label_smoothing"], options.get("class_weight", torch.ones(vocabulary)).double()
    eye = torch.eye(vocabulary, dtype=dtype)

    def gradient(z, threshold):
        loss = repdeg_fast.linear_cross_entropy(z, eye, target, **options, gradient_filter=threshold)
        return torch.autograd.grad(loss, z)[0].double()

    def call(z):
        capped = logits_of(options, z.detach().double(), eye.double())
        p, of_each = capped.softmax(1), smoothing / vocabulary * class_weight
        of_all = (1 - smoothing) * class_weight[target] + of_each.sum()
        slope = (of_all + 2 * options["lse_square_scale"] * capped.logsumexp(1)).abs()[:, None]
        error = (gradient(z, threshold) - gradient(z, None)).abs()
        allowed = slope * threshold + of_each
        excess_each = (error - allowed).clamp_min(0)
        slightly_more = 1 + 16 * torch.finfo(dtype).eps * max(1.0, capped.abs().max().item())  # a p is rounded
        left_out = (p < threshold * slightly_more) & (torch.arange(vocabulary) != target[:, None])
        excess_all = (error - left_out * (slope * p + of_each)).sum(1).clamp_min(0)
        return excess_each, excess_all

    def definition(z):
        return torch.zeros(rows, vocabulary), torch.zeros(rows)

    return Problem([z], call, definition, {**options, "gradient_filter": threshold}, gradients=False, steep=4.0)
