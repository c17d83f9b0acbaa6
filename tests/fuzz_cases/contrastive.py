"""The contrastive losses: of a batch, of a rank's share of one, of one that is encoded in chunks, and of spans."""

import contrastive_cases
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast.contracts.contrastive import DIRECTIONS, HARDNESS_MODES
from repdeg_fast.training import cached_backward

from .draw import GAP, Given, Problem, between, doubles, dtypes, matrices, reductions, seed, shortest, sizes


@st.composite
def contrastive(draw):
    seed(draw)
    dtype, width = draw(dtypes), draw(sizes)
    n, hard = draw(st.integers(2, 20)), draw(st.integers(0, 2))
    options, reduction = draw(options_of(n, hard)), draw(reductions)
    leaves = [draw(matrices(n, width, dtype=dtype)), draw(matrices(n * (1 + hard), width, dtype=dtype))]
    share = draw(st.booleans())
    if share:  # of the queries, as a rank has
        options["positive"] = torch.randperm(n)[: draw(st.integers(1, n))]
        leaves = [leaves[0].detach()[options["positive"]].requires_grad_(), leaves[1], leaves[0]]
    queries, documents, all_queries = doubles([*leaves, leaves[0]][:3])
    if options["similarity"] == "dot":  # 16 bits do not hold larger logits to what is left of them in a softmax
        sets = (queries, documents, all_queries)
        options["scale"] = min(1.0, 8 / max((x @ y.T).abs().max().item() for x in sets for y in sets))
    if dtype.itemsize > 2 and draw(st.booleans()):
        options["false_negative_margin"] = draw(margins(queries, documents, all_queries, options))
    chunk = None if share or reduction == "none" else draw(st.sampled_from([None, 1, 3, 7]))

    def loss(queries, documents, all_queries=None):
        return repdeg_fast.contrastive_loss(queries, documents, all_queries=all_queries, **options, reduction=reduction)

    def call(*vectors):
        if chunk is None:
            return (loss(*vectors),)
        copies = [x.detach().requires_grad_() for x in vectors]
        value = cached_backward(lambda x: 1 * x, loss, *copies, chunk_size=chunk).loss
        return (Given.apply(value, *vectors, *[x.grad for x in copies]),)

    def definition(queries, documents, all_queries=None):
        rows = contrastive_cases.definition(queries, documents, all_queries=all_queries, **options)
        return (rows if reduction == "none" else getattr(rows, reduction)(),)

    shown = {**options, "reduction": reduction, "chunk": chunk}
    return Problem(leaves, call, definition, shown, steep=20 * shortest(leaves))


@st.composite
def options_of(draw, n, hard):
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
    return options


@st.composite
def margins(draw, queries, documents, all_queries, options):
    """One that no similarity is near, in any direction."""
    if options["similarity"] == "cosine":
        queries, documents, all_queries = (F.normalize(x, dim=1) for x in (queries, documents, all_queries))
    own = documents[options.get("positive", torch.arange(len(queries)))]
    positive = (queries * own).sum(1, keepdim=True)
    distances = [rows @ columns.T - positive for rows in (queries, own) for columns in (documents, all_queries)]
    return between(torch.cat([d.flatten() for d in distances]), draw(st.floats(0.2, 1)), 4 * GAP)


@st.composite
def span_pairs(draw):
    seed(draw)
    leaf, reduction = (
        draw(matrices(2 * draw(st.integers(1, 30)), draw(sizes), dtype=draw(dtypes), scale=0.5)),
        draw(reductions),
    )

    def definition(x):
        scores = (x @ x.T).fill_diagonal_(-torch.inf)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return (F.cross_entropy(scores, torch.arange(len(x)) ^ 1, reduction=reduction),)

    call = lambda x: (repdeg_fast.span_pair_loss(x, reduction=reduction),)  # noqa: E731
    return Problem([leaf], call, definition, {"reduction": reduction}, steep=4.0)
