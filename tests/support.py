"""What every public operation and module can do inside PyTorch: the rows, the columns, and what each cell promises.

tests/test_support.py makes a test of each cell; ``python tests/support.py`` writes the tables of docs/compilers.md from
the same registry, and a test holds the page to it. A new operation is one entry in OPERATIONS."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import repdeg_fast as rf

PAGE = Path(__file__).parent.parent / "docs" / "compilers.md"
WIDTH, VOCABULARY = 8, 11

YES, ERROR, GPU, NONE = "✓", "error", "GPU", "–"


class Case(NamedTuple):
    """``function(*tensors, number, seed)`` of tensors with M rows; ``number`` is a coefficient of the operation."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: Callable[[int], list[Tensor]]
    coefficient: str = ""  # its name, where there is one
    seeded: bool = False


class ModuleCase(NamedTuple):
    """A module, made anew at each call, and its inputs, of which the first wants a gradient."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], list[Tensor]]
    coefficient: str = ""  # an attribute of it, where there is one


def _leaf(*shape: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) + mean).requires_grad_()


def _rows(number: int = 1) -> Callable[[int], list[Tensor]]:
    return lambda m: [_leaf(m, WIDTH) for _ in range(number)]


def _head(m: int) -> list[Tensor]:
    return [_leaf(m, WIDTH), _leaf(VOCABULARY, WIDTH), _leaf(VOCABULARY)]


def _heads(m: int) -> list[Tensor]:
    return [_leaf(2, m, WIDTH), *_head(m)[1:]]


def _target(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[-2], device=hidden.device) % VOCABULARY


def _add_in_place(weight: Tensor, number: float, seed: object) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    leaf.grad = torch.zeros_like(weight)
    value = rf.add_cosine_regularization_(leaf, number)
    return value + leaf.grad.sum()


def _sample(h: Tensor, mixture: Tensor, w: Tensor, number: float, seed: object) -> Tensor:
    return rf.gumbel_mix(h, mixture, w, temperature=number, seed=seed)[1]


def _losses_and_sample(h: Tensor, mixture: Tensor, w: Tensor, b: Tensor, number: float, seed: object) -> object:
    return rf.mlm_losses_and_sample(h, mixture, w, _target(h), b, temperature=number, seed=seed)[::2]


OPERATIONS: dict[str, Case] = {
    "admin_norm": Case(
        lambda x, f, w, number, seed: rf.admin_norm(x, f, weight=w, dropout=number, seed=seed),
        lambda m: [*_rows(2)(m), torch.rand(WIDTH).add(0.5).requires_grad_()],
        "dropout",
        seeded=True,
    ),
    "contrastive_loss": Case(lambda q, d, number, seed: rf.contrastive_loss(q, d, scale=number), _rows(2), "scale"),
    "span_pair_loss": Case(lambda x, number, seed: rf.span_pair_loss(x), _rows()),
    "cosine_regularization": Case(
        lambda w, number, seed: number * rf.cosine_regularization(w), _rows(), "its factor in the loss"
    ),
    "add_cosine_regularization_": Case(_add_in_place, _rows(), "coefficient"),
    "pairwise_cosine": Case(
        lambda x, y, number, seed: rf.pairwise_cosine(x, y, kind="relu", margin=number), _rows(2), "margin"
    ),
    "pairwise_max_cosine": Case(lambda x, number, seed: rf.pairwise_max_cosine(x).values, _rows()),
    "global_orthogonal_regularization": Case(
        lambda x, number, seed: rf.global_orthogonal_regularization(x, second_moment_weight=number),
        lambda m: [_leaf(m + 2 * WIDTH, WIDTH)],  # more vectors than dimensions: fewer are summed in another way
        "second_moment_weight",
    ),
    "gumbel_mix": Case(
        _sample, lambda m: [_leaf(2, m, WIDTH), _leaf(m, 2), _leaf(VOCABULARY, WIDTH)], "temperature", seeded=True
    ),
    "gradient_reversal": Case(lambda x, number, seed: rf.gradient_reversal(x, number), _rows(), "scale"),
    "linear_cross_entropy": Case(
        lambda h, w, b, number, seed: rf.linear_cross_entropy(h, w, _target(h), b, label_smoothing=number),
        _head,
        "label_smoothing",
    ),
    "multi_layer_mlm_loss": Case(
        lambda h, w, b, number, seed: rf.multi_layer_mlm_loss(h, w, _target(h), b, label_smoothing=number),
        _heads,
        "label_smoothing",
    ),
    "mlm_losses_and_sample": Case(
        _losses_and_sample,
        lambda m: [_leaf(2, m, WIDTH), _leaf(m, 2), *_head(m)[1:]],
        "temperature",
        seeded=True,
    ),
}


class TiedHead(nn.Module):
    """A head beside the embedding that it is tied to, as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = rf.MultiLayerMLMHead(WIDTH, self.embedding)

    def forward(self, hidden_states: Tensor, target: Tensor) -> Tensor:
        return self.head(hidden_states, target)


class Mixture(rf.GumbelMixture):
    def forward(self, hidden_states: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        seed = torch.ones(1, dtype=torch.int64, device=weight.device)
        return super().forward(hidden_states, hidden_states, weight, seed=seed)[1]


def _transformer() -> nn.Module:
    return rf.AdminTransformer(
        WIDTH, 2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=16, dropout=0.0, batch_first=True
    )


MODULES: dict[str, ModuleCase] = {
    "AdminNorm": ModuleCase(lambda: rf.AdminNorm(WIDTH, branch_bias=True), _rows(2), "dropout"),
    "AdminTransformer": ModuleCase(
        _transformer, lambda m: [_leaf(2, m, WIDTH), _leaf(2, 3, WIDTH)], "encoder.layers.0.norm1.dropout"
    ),
    "ContrastiveLoss": ModuleCase(lambda: rf.ContrastiveLoss(scale=5.0), _rows(2), "scale"),
    "CosineRegularization": ModuleCase(lambda: rf.CosineRegularization(0.5), _rows(), "coefficient"),
    "GumbelMixture": ModuleCase(
        lambda: Mixture(WIDTH, hard=False), lambda m: [_leaf(2, m, WIDTH), _leaf(VOCABULARY, WIDTH)], "temperature"
    ),
    "MultiLayerMLMHead": ModuleCase(
        TiedHead, lambda m: [_leaf(2, m, WIDTH), torch.arange(m).where(torch.arange(m) % 3 > 0, -100) % VOCABULARY]
    ),
}

# column -> what it promises; the tests are the functions of these names in test_support.py
OF_BOTH = {
    "compile": "`torch.compile(fullgraph=True)`: one graph, the same values and gradients",
    "M": "`dynamic=True`: other numbers of rows run in the same graph",
    "autocast": "bfloat16 autocast: values close to fp32's, gradients in the dtype of their leaves",
    "checkpoint": "activation checkpointing, without reentrance: the same bits, dropout and samples included",
    "reentrant": "activation checkpointing, with reentrance: the same bits",
    "export": "`torch.export.export`, the same value",
    "CUDA graph": "captured with its backward pass, replayed with other inputs (and another seed)",
    "func.grad": "`torch.func.grad` and `grad_and_value`, first derivatives; of operations under `vmap` too",
    "coefficient": "another coefficient runs in the same graph, from the second on",
}
OF_OPERATIONS = {
    **OF_BOTH,
    "seed": "another seed, an int, runs in the same graph (a tensor is an input like others)",
    "meta": "meta tensors: shapes and dtypes of values and gradients without memory",
    "vmap": "`torch.func.vmap`: values and gradients of each",
    "forward mode": "`torch.func.jvp`, `torch.autograd.forward_ad`",
    "double backward": "a derivative of the gradient",
}
OF_MODULES = {
    **OF_BOTH,
    "functional_call": "`torch.func.functional_call` with other parameters",
    "deepcopy": "a copy computes the same and shares nothing",
    "pickle": "so does one that was pickled",
    "state_dict": "`state_dict` into a new one: the same keys, the same value",
    "meta": "made on the meta device, then `to_empty` and `load_state_dict`",
}

# what of an operation is the same bits: (two runs, another number of threads, a row among other rows)
BITS, ROUNDING = "✓", "rounding"
_OF_ROWS = (BITS, BITS, BITS)
_WITH_PRODUCTS = (BITS, ROUNDING, ROUNDING)
_OF_ALL_ROWS = (BITS, ROUNDING, NONE)
DETERMINISM = {
    "admin_norm": _OF_ROWS,
    "gradient_reversal": _OF_ROWS,
    "cosine_regularization": (BITS, BITS, NONE),
    "add_cosine_regularization_": (BITS, BITS, NONE),
    "span_pair_loss": _OF_ALL_ROWS,
    "pairwise_cosine": _OF_ALL_ROWS,
    "global_orthogonal_regularization": _OF_ALL_ROWS,
    "contrastive_loss": _WITH_PRODUCTS,
    "pairwise_max_cosine": _WITH_PRODUCTS,
    "gumbel_mix": _WITH_PRODUCTS,
    "linear_cross_entropy": _WITH_PRODUCTS,
    "multi_layer_mlm_loss": _WITH_PRODUCTS,
    "mlm_losses_and_sample": _WITH_PRODUCTS,
}


class Rows(NamedTuple):
    """An operation as a function of the first m of its rows, everything else being the same: a result a row."""

    tensors: Callable[[], list[Tensor]]
    first: Callable[..., Tensor]  # (m, *tensors)


def _first_losses(m: int, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = h[..., :m, :]
    if h.dim() == 2:
        return rf.linear_cross_entropy(h, w, _target(h), b, reduction="none")
    return rf.multi_layer_mlm_loss(h, w, _target(h), b, reduction="none").T


def _first_losses_and_values(m: int, h: Tensor, mixture: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, options = h[:, :m], {"seed": 3, "reduction": "none"}
    losses, _, values = rf.mlm_losses_and_sample(h, mixture[:m], w, _target(h), b, **options)
    return torch.cat([losses.T, values], dim=1)


_MANY = 150
ROWS = {
    "admin_norm": Rows(
        lambda: [torch.randn(_MANY, 40), torch.randn(_MANY, 40)],
        lambda m, x, f: rf.admin_norm(x[:m], f[:m], dropout=0.2, seed=3),
    ),
    "gradient_reversal": Rows(lambda: [torch.randn(_MANY, 40)], lambda m, x: rf.gradient_reversal(x[:m])),
    "contrastive_loss": Rows(
        lambda: [torch.randn(_MANY, 40), torch.randn(_MANY, 40)],
        lambda m, q, d: rf.contrastive_loss(q[:m], d, positive=torch.arange(m), all_queries=q, reduction="none"),
    ),
    "pairwise_max_cosine": Rows(
        lambda: [torch.randn(_MANY, 40), torch.randn(90, 40)],
        lambda m, x, y: rf.pairwise_max_cosine(x[:m], y).values,
    ),
    "gumbel_mix": Rows(
        lambda: [torch.randn(2, _MANY, 40), torch.randn(_MANY, 2), torch.randn(90, 40)],
        lambda m, h, mixture, w: rf.gumbel_mix(h[:, :m], mixture[:m], w, seed=3)[1],
    ),
    "linear_cross_entropy": Rows(lambda: [torch.randn(_MANY, 40), *_wide_head()], _first_losses),
    "multi_layer_mlm_loss": Rows(lambda: [torch.randn(2, _MANY, 40), *_wide_head()], _first_losses),
    "mlm_losses_and_sample": Rows(
        lambda: [torch.randn(2, _MANY, 40), torch.randn(_MANY, 2), *_wide_head()], _first_losses_and_values
    ),
}


def _wide_head() -> list[Tensor]:
    return [torch.randn(90, 40), torch.randn(90)]


NOTES = {
    "coefficient": "A Python number is a constant of the first graph. When it changes, PyTorch compiles once more, and "
    "that graph serves other values too (`dynamic=True`: the first does), gradients included; but 0 has a graph of its "
    "own where it leaves something out, as dropout does. An attribute of a module is no different if it is a float; "
    "an int there torch takes for a constant each time: write 20.0, and hand seeds to `forward`. An operator then "
    "gets the number as a float64 on the CPU, which the host reads without waiting for a GPU. Under "
    '`mode="reduce-overhead"` it is left out of inductor\'s CUDA graphs (its tag is `cudagraph_unsafe`); one whose '
    "numbers never change is not.",
    "func.grad": "Under `vmap` an operator is called once for each of the batch. A derivative of such a gradient, by "
    "`grad` again, `jvp` or `hessian`, is the error of the last two columns.",
    "error": "*error*: a `RuntimeError` that names the operation and what to do: the formulas in "
    "`repdeg_fast.reference` are differentiable in any way.",
    "GPU": "*GPU*: a test that needs one, and has not run here (`make gpu` runs it).",
    "–": "*–*: there is no such thing: no coefficient, no seed, a gradient written in place, or, of "
    "`MultiLayerMLMHead` in a CUDA graph, a number of masked positions that the host must know.",
}

_IN_PLACE = ("checkpoint", "reentrant", "vmap", "func.grad", "forward mode", "double backward")
EXCEPTIONS = {
    **{("add_cosine_regularization_", column): NONE for column in _IN_PLACE},
    **{(row, "coefficient"): NONE for row, case in (OPERATIONS | MODULES).items() if not case.coefficient},
    **{(row, "seed"): NONE for row, case in OPERATIONS.items() if not case.seeded},
    ("gradient_reversal", "double backward"): YES,
    ("MultiLayerMLMHead", "CUDA graph"): NONE,
}
_USUAL = {"CUDA graph": GPU, "forward mode": ERROR, "double backward": ERROR}


def promise(row: str, column: str) -> str:
    return EXCEPTIONS.get((row, column), _USUAL.get(column, YES))


def cells() -> list[tuple[str, str]]:
    """Those that a test stands behind."""
    tables = ((OPERATIONS, OF_OPERATIONS), (MODULES, OF_MODULES))
    every = [(row, column) for rows, columns in tables for row in rows for column in columns]
    return [cell for cell in every if promise(*cell) != NONE]


def tables() -> str:
    """Both tables in Markdown, what the columns mean, and the notes."""
    parts = [_table("operation", OPERATIONS, OF_OPERATIONS), _table("module", MODULES, OF_MODULES)]
    parts.append("\n".join(f"- **{column}**: {meaning}." for column, meaning in (OF_OPERATIONS | OF_MODULES).items()))
    parts[-1] = parts[-1].replace(
        f"- **meta**: {OF_MODULES['meta']}.", f"- **meta**: {OF_OPERATIONS['meta']}; of modules: {OF_MODULES['meta']}."
    )
    coefficients = "; ".join(
        f"{case.coefficient} of `{row}`" for row, case in (OPERATIONS | MODULES).items() if case.coefficient
    )
    return "\n\n".join([*parts, *NOTES.values(), f"Coefficients: {coefficients}."])


def determinism() -> str:
    lines = ["| operation | two runs | threads | batch |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{row}` | " + " | ".join(cells) + " |" for row, cells in DETERMINISM.items()])


def _table(title: str, rows: dict, columns: dict) -> str:
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| `{row}` | " + " | ".join(promise(row, column) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


BEGIN, END = "<!-- made by `python tests/support.py` -->\n\n", "\n\n<!-- end -->"


def page(text: str) -> str:
    """The page with the tables as they should be."""
    before, *made = text.split(BEGIN)
    after = [part.split(END)[1] for part in made]
    return before + "".join(
        BEGIN + new + END + rest for new, rest in zip((tables(), determinism()), after, strict=True)
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
