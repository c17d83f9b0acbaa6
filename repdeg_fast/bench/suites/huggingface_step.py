"""A training step of a masked-language model of transformers, forward and backward without the optimizer: as it is, in
eager PyTorch and compiled, and after ``integrations.huggingface.apply``.

The case's dtype is that of autocast; parameters are in float32. Dropout is 0, so that the loss can be compared. Needs
transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.backends import use_backend
from repdeg_fast.bench.suite import FORWARD, Case, Inputs, Provider, Suite, Work
from repdeg_fast.ops.linear_cross_entropy import operation

FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert")
_ADMIN = ("bert", "roberta", "electra")  # whose sub-layers end in what ADMIN's block replaces
_HEAD_WIDTH, _WIDENING = 64, 4  # of attention; of the feed-forward part in units of d
_MASKED = 0.15
_MASK_TOKEN = 103
_BERT_VOCABULARY = 30522


def _case(name: str, batch: int, length: int, width: int, layers: int, vocabulary: int, **options: Any) -> Case:
    sizes = {"B": batch, "S": length, "d": width, "layers": layers, "V": vocabulary}
    missing = None if importlib.util.find_spec("transformers") else "transformers is not installed"
    return Case(name, sizes, tokens=batch * length, unavailable=missing, **options)


CASES = [
    _case("bert-6x384", 16, 128, 384, 6, _BERT_VOCABULARY, default_on=("cpu",)),
    *(_case(f"{family}-6x384", 16, 128, 384, 6, _BERT_VOCABULARY, default_on=()) for family in FAMILIES[1:4]),
    _case("modernbert-6x384", 16, 128, 384, 6, 50368, default_on=()),
    _case("bert-base", 64, 512, 768, 12, _BERT_VOCABULARY, dtype=torch.bfloat16, default_on=("cuda",)),
    _case("modernbert-base", 32, 1024, 768, 22, 50368, dtype=torch.bfloat16, default_on=("cuda",)),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random tokens, 15 % of them masked, and the parameters by name: all providers train the same tensors."""
    torch.manual_seed(0)
    family = next(name for name in FAMILIES if case.name.startswith(name))
    model = _model(family, case.sizes).to(device)
    shape = (case.sizes["B"], case.sizes["S"])
    tokens = torch.randint(_MASK_TOKEN + 1, case.sizes["V"], shape, device=device)
    masked = torch.rand(shape, device=device) < _MASKED
    return {
        "input_ids": tokens.masked_fill(masked, _MASK_TOKEN),
        "labels": tokens.masked_fill(~masked, -100),
        "autocast": torch.empty(0, dtype=case.dtype),
        "family": torch.tensor(FAMILIES.index(family)),
        "sizes": torch.tensor([case.sizes[name] for name in ("S", "d", "layers", "V")]),
        **dict(model.named_parameters()),
    }


def _model(family: str, sizes: dict[str, int]) -> Any:
    import transformers

    width, layers = sizes["d"], sizes["layers"]
    heads = max(1, width // _HEAD_WIDTH)
    common: dict[str, Any] = {"vocab_size": sizes["V"], "max_position_embeddings": sizes["S"] + 2, "pad_token_id": 1}
    if family == "distilbert":
        config: Any = transformers.DistilBertConfig(
            **common, dim=width, hidden_dim=_WIDENING * width, n_layers=layers, n_heads=heads, dropout=0.0,
            attention_dropout=0.0,
        )  # fmt: skip
        return transformers.DistilBertForMaskedLM(config)
    common |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if family == "modernbert":
        special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
        config = transformers.ModernBertConfig(**common, **special, intermediate_size=width * 3 // 2)
        return transformers.ModernBertForMaskedLM(config)
    common |= {"intermediate_size": _WIDENING * width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "electra":
        return transformers.ElectraForMaskedLM(transformers.ElectraConfig(**common, embedding_size=width))
    if family == "roberta":
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**common))
    return transformers.BertForMaskedLM(transformers.BertConfig(**common))


def _module(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Any:
    """A model around the parameters that ``inputs`` holds."""
    sizes = dict(zip(("S", "d", "layers", "V"), inputs["sizes"].tolist(), strict=True))
    model = _model(FAMILIES[int(inputs["family"])], sizes).to(inputs["input_ids"].device)
    parameters = {name: inputs[name] for name, _ in model.named_parameters()}
    if dtype != torch.float32:
        parameters = {name: parameter.detach().to(dtype) for name, parameter in parameters.items()}
    model.load_state_dict(parameters, strict=False, assign=True)
    model.tie_weights()
    return model


def _loss(model: Any, inputs: Inputs) -> Tensor:
    words, dtype = inputs["input_ids"], inputs["autocast"].dtype
    with torch.autocast(words.device.type, dtype, enabled=dtype != torch.float32):
        return model(words, labels=inputs["labels"]).loss


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    plain = {**inputs, "autocast": torch.empty(0)}
    return _loss(_module(inputs, dtype=torch.float64), plain)


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """Bytes: every weight read once, and its gradient written once. Operations: two a weight and token in the layers,
    attention's products, and the head at masked positions; backward twice that."""
    batch, length, width, layers, vocabulary = (case.sizes[name] for name in ("B", "S", "d", "layers", "V"))
    tokens, masked = batch * length, round(_MASKED * batch * length)
    layer_weights = (4 + 2 * _WIDENING) * width**2
    weights = layers * layer_weights + vocabulary * width
    flops = 2 * tokens * layers * (layer_weights + 2 * length * width) + 2 * masked * vocabulary * width
    return Work(4 * weights, flops) if pass_ == FORWARD else Work(12 * weights, 3 * flops)


def _logits_needs(case: Case) -> Work:
    """The logits of all positions in fp32, their log-softmax and its gradient."""
    return Work(3 * 4 * case.sizes["B"] * case.sizes["S"] * case.sizes["V"], 0)


def _plain(inputs: Inputs, compile_: bool = False) -> Callable[[], Tensor]:
    model = _module(inputs)
    run = torch.compile(model, dynamic=False) if compile_ else model
    return lambda: _loss(run, inputs)


def _ours(backend: str, admin_norm: bool = False) -> Provider:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        from repdeg_fast.integrations import huggingface

        model = huggingface.apply(_module(inputs), admin_norm=admin_norm)

        def run() -> Tensor:
            with use_backend(backend):
                return _loss(model, inputs)

        return run

    def unavailable(inputs: Inputs) -> str | None:
        if admin_norm and FAMILIES[int(inputs["family"])] not in _ADMIN:
            return "its sub-layers do not end in dropout, sum and LayerNorm"
        words = next(iter(tensor for tensor in inputs.values() if tensor.requires_grad))
        return operation.unavailable(backend, words.device.type, words, words)

    name = f"ours-admin-norm-{backend}" if admin_norm else f"ours-{backend}"
    return Provider(name, prepare, ours=True, unavailable=unavailable)


def _case_of_weights(name: str, weight: Tensor) -> Case:
    """A BERT around an embedding, which is all that one matrix says about it."""
    return _case(f"bert-{name}", 8, 64, weight.shape[1], 6, weight.shape[0])


SUITE = Suite(
    op="huggingface_step",
    cases=CASES,
    providers=[
        Provider("eager", _plain, needs=_logits_needs),
        Provider("compile", lambda inputs: _plain(inputs, compile_=True), needs=_logits_needs),
        *(_ours(backend, admin_norm) for backend in ("cpu", "triton") for admin_norm in (False, True)),
    ],
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.tokens or 0,
    size_label="tokens",
    value_name="loss",
    case_of_weights=_case_of_weights,
)
