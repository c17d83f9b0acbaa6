"""Measures over pairs: the N × N matrix in eager and compiled PyTorch, sentence-transformers' GOR, and ours.

A case's name begins with its measure, whose number among MEASURES is one of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.bench.peers import SENTENCE_TRANSFORMERS
from repdeg_fast.bench.suite import FORWARD, Case, Inputs, Provider, Suite, Work, compiled, per_backend
from repdeg_fast.ops.pairwise import operation

MEASURES = ("gor", "logmeanexp", "square")
TEMPERATURE = 0.25
_CHUNK = 1024  # rows of the exact value's cosines that are in float64 at a time


def _case(name: str, rows: int, columns: int, **options: object) -> Case:
    return Case(name, {"N": rows, "d": columns}, **options)  # type: ignore[arg-type]


CASES = [
    _case("gor-4096", 4096, 384),
    _case("logmeanexp-8192", 8192, 384),
    _case("logmeanexp-65536", 65536, 768, dtype=torch.bfloat16, default_on=("cuda",)),
    *(_case(f"square-{rows}", rows, 384, group="sweep", default_on=("cuda",)) for rows in (4096, 8192, 16384, 32768)),
]


def measure_of(inputs: Inputs) -> str:
    return MEASURES[int(inputs["measure"])]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Rows in a cone: for those spread evenly GOR is all but zero, and no measure of a provider's accuracy."""
    generator = torch.Generator(device).manual_seed(0)
    size = case.sizes["N"], case.sizes["d"]
    x = case.load() if case.load else torch.randn(*size, generator=generator, device=device).add_(0.3)
    number = MEASURES.index(case.name.partition("-")[0])
    return {"x": x.to(device, case.dtype).requires_grad_(), "measure": torch.tensor(number)}


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    """In float64, some rows at a time."""
    unit, measure = F.normalize(inputs["x"].double(), dim=1), measure_of(inputs)
    n, d = unit.shape
    if measure == "logmeanexp":
        total = sum((rows @ unit.T / TEMPERATURE).exp().sum() for rows in unit.split(_CHUNK))
        return ((total - n * torch.tensor(1 / TEMPERATURE).exp()) / (n * (n - 1))).log()
    square = ((unit.T @ unit).square().sum() - n) / (n * (n - 1))
    mean = (unit.sum(0).square().sum() - n) / (n * (n - 1))
    return square if measure == "square" else mean**2 + (square - 1 / d).relu()


def eager(x: Tensor, measure: str) -> Tensor:
    """As one writes it with the N × N matrix."""
    unit = F.normalize(x, dim=1)
    cosines, (n, d) = unit @ unit.T, x.shape
    if measure == "logmeanexp":
        own = torch.eye(n, dtype=torch.bool, device=x.device)
        total = (cosines / TEMPERATURE).masked_fill(own, -torch.inf).flatten().logsumexp(0)
        return total - torch.tensor(float(n * (n - 1)), device=x.device).log()
    cosines = cosines.fill_diagonal_(0)
    square = cosines.square().sum() / (n * (n - 1))
    return square if measure == "square" else (cosines.sum() / (n * (n - 1))) ** 2 + (square - 1 / d).relu()


def ours(inputs: Inputs) -> Tensor:
    measure = measure_of(inputs)
    if measure == "gor":
        return repdeg_fast.global_orthogonal_regularization(inputs["x"])
    return repdeg_fast.pairwise_cosine(inputs["x"], kind=measure, temperature=TEMPERATURE)


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """Vectors are read, their gradient is written. In closed form one product of N·d² forward and one backward; else
    the cosines of each unordered pair, and backward what each of the two says of the other."""
    n, d = case.sizes["N"], case.sizes["d"]
    vectors, forward = n * d * case.dtype.itemsize, pass_ == FORWARD
    if case.name.startswith("logmeanexp"):
        return Work((1 if forward else 2) * vectors, (1 if forward else 3) * n * n * d)
    return Work((1 if forward else 3) * vectors, (2 if forward else 4) * n * d * d)


def _matrices(case: Case) -> Work:
    """Cosines, what is made of them, and the gradients of both, in fp32; three products."""
    n, d = case.sizes["N"], case.sizes["d"]
    return Work(4 * 4 * n * n, 6 * n * n * d)


def _prepare(function: Callable[[Tensor, str], Tensor]) -> Callable[[Inputs], Callable[[], Tensor]]:
    return lambda inputs: partial(function, inputs["x"], measure_of(inputs))


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    return partial(compiled(eager), inputs["x"], measure_of(inputs))


def _sentence_transformers(inputs: Inputs) -> Callable[[], Tensor]:
    from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss

    loss = GlobalOrthogonalRegularizationLoss(torch.nn.Identity())  # type: ignore[arg-type]

    def run() -> Tensor:
        mean, second_moment = loss.compute_loss_from_embeddings([inputs["x"]]).values()
        return mean + second_moment

    return run


def _not_theirs(inputs: Inputs) -> str | None:
    measure = measure_of(inputs)
    return SENTENCE_TRANSFORMERS.unavailable(inputs) if measure == "gor" else f"has no {measure}"


PROVIDERS = [
    Provider("eager", _prepare(eager), needs=_matrices),
    Provider("compile", _compiled, needs=_matrices),
    replace(SENTENCE_TRANSFORMERS.provider(_sentence_transformers, needs=_matrices), unavailable=_not_theirs),
    *per_backend(operation, ours, lambda inputs: [inputs["x"]]),
]

SUITE = Suite(
    op="pairwise",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["N"],
    size_label="N",
    value_name="measure",
    case_of_weights=lambda name, weight: Case(
        f"square-{name}", dict(zip("Nd", weight.shape, strict=True)), weight.dtype, load=lambda: weight
    ),
)
