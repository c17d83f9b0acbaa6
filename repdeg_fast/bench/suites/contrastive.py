"""The contrastive loss of a batch of pairs: the N × N matrix of scores in eager and compiled PyTorch, every peer that
is installed, ours, and the three GEMMs that none can do without. Of sentence-transformers the loss stage alone, of its
cached loss with the mini-batch of its default and with a larger one: there it is the chunk of the loss, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.bench import peers, products
from repdeg_fast.bench.suite import (
    FORWARD,
    FORWARD_BACKWARD,
    Case,
    Inputs,
    Provider,
    Suite,
    Work,
    compiled,
    per_backend,
)
from repdeg_fast.ops.contrastive import operation

SCALE = 20.0
_ROWS = 1024  # of scores of the exact value that are in float64 at a time


def pairs(name: str, n: int, d: int, **options: Any) -> Case:
    return Case(name, {"N": n, "d": d}, **options)


CASES = [
    pairs("small", 1024, 384, default_on=(), brief=True),
    pairs("batch-4096", 4096, 384, default_on=("cpu",)),
    pairs("batch-16384", 16384, 768, default_on=("cuda",)),
    pairs("batch-65536", 65536, 768, default_on=("cuda",), dtype=torch.bfloat16),
    *(pairs(f"sweep-{n}", n, 384, group="sweep", default_on=("cuda",)) for n in (1024, 2048, 4096, 8192)),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Documents that resemble their queries, as in the middle of a training."""
    n, d = case.sizes["N"], case.sizes["d"]
    options: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": case.dtype}
    if case.load:
        rows = case.load().to(device, case.dtype)
        queries, documents = rows[0 : 2 * n : 2].contiguous(), rows[1 : 2 * n : 2].contiguous()
    else:
        queries = torch.randn(n, d, **options)
        documents = queries + 3 * torch.randn(n, d, **options)
    return {"queries": queries.requires_grad_(), "documents": documents.requires_grad_()}


def case_of_weights(name: str, weight: Tensor) -> Case:
    """Neighbouring rows as pairs."""
    n, d = weight.shape
    unavailable = "the contrastive loss needs four rows or more: two pairs" if n < 4 else None
    return pairs(name, min(n // 2, 16384), d, dtype=weight.dtype, load=lambda: weight, unavailable=unavailable)


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    """The mean loss in float64, some rows at a time."""
    queries, documents = (F.normalize(x.double(), dim=1) for x in inputs.values())
    total = queries.new_zeros(())
    for rows, own in zip(queries.split(_ROWS), documents.split(_ROWS), strict=True):
        total += ((SCALE * rows @ documents.T).logsumexp(1) - SCALE * (rows * own).sum(1)).sum()
    return total / len(queries)


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """One GEMM forward, two more backward. Forward reads both inputs, backward again, and writes their gradients."""
    n, d = case.sizes["N"], case.sizes["d"]
    operands = 2 * n * d * case.dtype.itemsize
    return Work(operands, 2 * n * n * d) if pass_ == FORWARD else Work(3 * operands, 6 * n * n * d)


def _scores(number: int) -> Callable[[Case], Work]:
    """So many (N, N) matrices in fp32."""
    return lambda case: Work(4 * number * case.sizes["N"] ** 2, 0)


def _published(queries: Tensor, documents: Tensor) -> Tensor:
    scores = SCALE * F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
    return F.cross_entropy(scores.float(), torch.arange(len(queries), device=queries.device))


def _prepare_eager(inputs: Inputs, function: Callable[..., Tensor] = _published) -> Callable[[], Tensor]:
    return lambda: function(inputs["queries"], inputs["documents"])


def _prepare_sentence_transformers(inputs: Inputs) -> Callable[[], Tensor]:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss: Any = MultipleNegativesRankingLoss(nn.Identity(), scale=SCALE)  # type: ignore[arg-type]
    return lambda: loss.compute_loss_from_embeddings([inputs["queries"], inputs["documents"]], None)


def _prepare_cached(mini_batch: int) -> Callable[[Inputs], Callable[[], Tensor]]:
    """What happens between its two passes over the encoder: leaves in mini-batches, loss and their gradients."""

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        model: Any = nn.Sequential(nn.Identity())
        loss: Any = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=mini_batch)
        leaves = list(inputs.values())

        def run() -> Tensor:
            columns = [[part.detach().requires_grad_() for part in leaf.split(mini_batch)] for leaf in leaves]
            value: Tensor = loss.calculate_loss(columns, with_backward=True)
            for leaf, column in zip(leaves, columns, strict=True):
                gradient = torch.cat([part.grad for part in column])
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
            return value

        return run

    return prepare


def _prepare_info_nce(inputs: Inputs) -> Callable[[], Tensor]:
    from info_nce import info_nce

    return lambda: info_nce(inputs["queries"], inputs["documents"], temperature=1 / SCALE)


def _prepare_metric_learning(inputs: Inputs) -> Callable[[], Tensor]:
    """Its SupConLoss, which for one positive a row is this loss; its NTXentLoss lists N³ triples."""
    from pytorch_metric_learning.losses import SupConLoss

    loss, labels = SupConLoss(temperature=1 / SCALE), torch.arange(len(inputs["queries"]))
    labels = labels.to(inputs["queries"].device)
    others = labels.clone()  # of the same tensor it would leave the diagonal out
    return lambda: loss(inputs["queries"], labels, ref_emb=inputs["documents"], ref_labels=others)


def _prepare_gemms(inputs: Inputs) -> Callable[[], Tensor]:
    """Q Dᵀ forward, Z D and Zᵀ Q backward."""
    leaf = inputs["queries"]
    queries, documents = (x.detach() for x in inputs.values())
    scores = products.new_rows(queries, len(queries), len(documents))
    backward = [(scores, documents, torch.empty_like(queries)), (scores.t(), queries, torch.empty_like(documents))]
    return products.prepare(leaf, [(queries, documents.t(), scores)], backward)


def _cached(name: str, mini_batch: int) -> Provider:
    return peers.SENTENCE_TRANSFORMERS.provider(
        _prepare_cached(mini_batch), name=name, passes=(FORWARD_BACKWARD,), graph_free=True, in_brief=False,
        in_sweeps=False,
    )  # fmt: skip


PROVIDERS = [
    Provider("gemms", _prepare_gemms, needs=_scores(1), floor="a floor: no loss"),
    Provider("eager", _prepare_eager, needs=_scores(4)),
    Provider("compile", lambda inputs: _prepare_eager(inputs, compiled(_published)), needs=_scores(4), in_brief=False),
    peers.SENTENCE_TRANSFORMERS.provider(_prepare_sentence_transformers, needs=_scores(5)),
    _cached("st-cached-32", 32),
    _cached("st-cached-256", 256),
    peers.INFO_NCE.provider(_prepare_info_nce, needs=_scores(4)),
    peers.METRIC_LEARNING.provider(_prepare_metric_learning, needs=_scores(12), in_sweeps=False),
    *per_backend(
        operation,
        lambda inputs: repdeg_fast.contrastive_loss(inputs["queries"], inputs["documents"], scale=SCALE),
        lambda inputs: list(inputs.values()),
    ),
]

SUITE = Suite(
    op="contrastive",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["N"],
    size_label="N",
    value_name="loss",
    case_of_weights=case_of_weights,
)
