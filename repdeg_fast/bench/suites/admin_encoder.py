"""A deep post-LN encoder, whole: ``nn.TransformerEncoder`` against ADMIN's, for memory above all.

Dropout, where a case has it, is that of the residual branches, as in the papers' models; attention and feed-forward
parts have none. There the branches are so small that no mask shows in the output, for providers draw different ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from repdeg_fast.backends import BACKENDS, use_backend
from repdeg_fast.bench.suite import FORWARD, Case, Inputs, Provider, Suite, Work, compiled
from repdeg_fast.nn import from_torch
from repdeg_fast.ops.admin_norm import operation

_HEADS, _WIDENING = 8, 4  # attention heads; width of the feed-forward part in units of d
_BRANCH_SIZE = 1e-8


def _case(name: str, layers: int, batch: int, length: int, width: int, dropout: int = 0, **options: object) -> Case:
    sizes = {"layers": layers, "B": batch, "S": length, "d": width, "dropout_percent": dropout}
    return Case(name, sizes, tokens=batch * length, **options)  # type: ignore[arg-type]


CASES = [
    _case("60-layer", 60, 2, 256, 512, dropout=10, default_on=()),
    _case("60-layer-large", 60, 32, 256, 512, dropout=10, default_on=()),
    _case("12-layer", 12, 32, 256, 512, default_on=("cuda",)),
    _case("6-layer", 6, 2, 128, 256, default_on=("cpu",)),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The hidden states, which get a gradient as those of an embedding do (and as each layer's do, so that all layers
    share a compilation), and the parameters of ADMIN's encoder by name: torch's are the same without ω."""
    torch.manual_seed(0)
    encoder = from_torch(_encoder(case.sizes["layers"], case.sizes["d"], device, case.dtype))
    if case.sizes["dropout_percent"]:
        for layer in encoder.layers:
            nn.init.normal_(layer.self_attn.out_proj.weight, std=_BRANCH_SIZE)
            nn.init.normal_(layer.linear2.weight, std=_BRANCH_SIZE)
            nn.init.zeros_(layer.linear2.bias)
    shape = (case.sizes["B"], case.sizes["S"], case.sizes["d"])
    dropout = torch.tensor(case.sizes["dropout_percent"] / 100)
    source = torch.randn(shape, device=device, dtype=case.dtype)
    return {"src": source.requires_grad_(), "dropout": dropout, **dict(encoder.named_parameters())}


def _encoder(layers: int, width: int, device: torch.device | str, dtype: torch.dtype) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, _HEADS, _WIDENING * width, dropout=0.0, batch_first=True, device=device, dtype=dtype
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _module(inputs: Inputs, admin: bool) -> nn.TransformerEncoder:
    """An encoder around the parameters that ``inputs`` holds: every provider trains the same tensors."""
    source = inputs["src"]
    layers = sum(name.endswith("linear1.weight") for name in inputs)
    plain = _encoder(layers, source.shape[-1], "meta", source.dtype)
    for layer in plain.layers:
        layer.dropout1.p = layer.dropout2.p = inputs["dropout"].item()
    module = from_torch(plain) if admin else plain
    names = module.state_dict().keys()
    module.load_state_dict({name: inputs[name] for name in names}, assign=True)
    return module


def exact(inputs: Inputs) -> Tensor:
    """In float64; layer by layer, so that one layer's weights are in float64 at a time."""
    hidden = inputs["src"].double()
    with torch.no_grad():
        for layer in _module(inputs, admin=False).layers:
            parameters = {name: parameter.double() for name, parameter in layer.named_parameters()}
            hidden = torch.func.functional_call(layer, parameters, (hidden,))
    return hidden


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """Bytes: every weight read once, and its gradient written once. Operations: the GEMMs, 2 a weight and token, and
    attention's two products; backward twice that."""
    tokens, width, length = case.sizes["B"] * case.sizes["S"], case.sizes["d"], case.sizes["S"]
    weights = case.sizes["layers"] * (4 + 2 * _WIDENING) * width**2
    flops = 2 * tokens * weights + 4 * case.sizes["layers"] * tokens * length * width
    if pass_ == FORWARD:
        return Work(weights * case.dtype.itemsize, flops)
    return Work(3 * weights * case.dtype.itemsize, 3 * flops)


def _torchs(inputs: Inputs) -> Callable[[], Tensor]:
    module = _module(inputs, admin=False)
    return lambda: module(inputs["src"])


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    """Layer by layer: they share one compilation, and the whole would take minutes."""
    module = _module(inputs, admin=False)
    apply = compiled(lambda layer, hidden: layer(hidden))

    def run() -> Tensor:
        hidden = inputs["src"]
        for layer in module.layers:
            hidden = apply(layer, hidden)
        return hidden

    return run


def _ours(backend: str) -> Provider:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        module = _module(inputs, admin=True)

        def run() -> Tensor:
            with use_backend(backend):
                return module(inputs["src"])

        return run

    def unavailable(inputs: Inputs) -> str | None:
        rows = inputs["src"].flatten(0, 1)
        return operation.unavailable(backend, rows.device.type, rows, rows)

    return Provider(f"ours-{backend}", prepare, ours=True, unavailable=unavailable)


def _case_of_weights(name: str, weight: Tensor) -> Case:
    """One layer of the width of the weight's rows, which is all that one matrix says about an encoder."""
    return _case(name, 1, 2, 128, weight.shape[-1], dtype=weight.dtype)


SUITE = Suite(
    op="admin_encoder",
    cases=CASES,
    providers=[Provider("eager", _torchs), Provider("compile", _compiled), *map(_ours, BACKENDS)],
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["layers"],
    size_label="layers",
    value_name="mean of the output",
    case_of_weights=_case_of_weights,
)
