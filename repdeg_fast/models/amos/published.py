"""Checkpoints of the authors' AMOS (fairseq) as :class:`AmosForPreTraining`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from repdeg_fast.models.amos.config import AmosConfig
from repdeg_fast.models.amos.model import AmosForPreTraining

_ENCODERS = {"encoder.sentence_encoder": "discriminator", "auxiliary.sentence_encoder": "generator"}
_EMBEDDINGS = {
    "embed_tokens.weight": "embeddings.word_embeddings.weight",
    "embed_positions.weight": "embeddings.position_embeddings.weight",
    "emb_layer_norm": "embeddings.LayerNorm",
    "relative_attention_bias.weight": "relative_positions.weight",
}
_LAYER = {
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_HEADS = {
    "auxiliary.lm_head.dense": "mlm_head.dense",
    "auxiliary.lm_head.layer_norm": "mlm_head.layer_norm",
    "auxiliary.lm_head.bias": "mlm_head.bias",
    "auxiliary.lm_head.layer_mixture.weight": "mixture.score.weight",
    "encoder.binary_head.out_proj": "rtd_head",
}


def from_published(state_dict: Mapping[str, Tensor], **options: Any) -> AmosForPreTraining:
    """The model of a fairseq checkpoint (its entry ``"model"``), with sizes as they are found there.

    Its discriminator says how *original* a token looks, ours how *replaced*: the head's weights change their sign.

    Args:
        state_dict: by fairseq's names. ``torch.load(file, weights_only=True)`` needs
            ``torch.serialization.add_safe_globals([argparse.Namespace])`` for such a file.
        options: fields of :class:`AmosConfig`: ``mlm_layers``, unless they are (4, 6, 8), which no tensor tells;
            ``pad_token_id``; what differs from :meth:`AmosConfig.published`.

    Raises:
        TypeError: ``state_dict`` is no mapping of names to tensors.
        ValueError: a tensor that is missing, one that has no place, or one of another shape (named).
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected names and tensors, got {type(state_dict).__name__}; torch.load a file")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            hint = ": pass that entry" if name == "model" else ""
            raise TypeError(f"state_dict: expected tensors, got {type(tensor).__name__} as {name!r}{hint}")
    config = AmosConfig.published(**(_sizes(state_dict) | options))
    model = AmosForPreTraining(config)
    found = dict(_renamed(state_dict))
    for name in ("rtd_head.weight", "rtd_head.bias"):
        if name in found:
            found[name] = -found[name]
    own = model.state_dict()
    for name, tensor in found.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(
                f"state_dict: expected shape {tuple(own[name].shape)} for {name}, got {tuple(tensor.shape)}"
            )
    result = model.load_state_dict(found, strict=False)
    tied = {*model.all_tied_weights_keys}
    if missing := [name for name in result.missing_keys if name not in tied]:
        raise ValueError(f"state_dict: expected tensors for {', '.join(missing)}, got none")
    if result.unexpected_keys:
        raise ValueError(f"state_dict: expected no place for {', '.join(result.unexpected_keys)}; check mlm_layers")
    return model


def _sizes(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    encoder = next(iter(_ENCODERS))
    try:
        vocabulary, width = state_dict[f"{encoder}.embed_tokens.weight"].shape
        positions = len(state_dict[f"{encoder}.embed_positions.weight"])
        buckets, heads = state_dict[f"{encoder}.relative_attention_bias.weight"].shape
        widening = len(state_dict[f"{encoder}.layers.0.fc1.weight"])
    except KeyError as missing:
        raise ValueError(f"state_dict: expected the tensors of the authors' AMOS, found no {missing}") from missing
    layers = sum(name.startswith(f"{encoder}.layers.") and name.endswith(".fc1.weight") for name in state_dict)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": positions,
        "relative_position_buckets": buckets,
        "num_attention_heads": heads,
        "intermediate_size": widening,
        "num_hidden_layers": layers,
    }


def _renamed(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state_dict.items():
        encoder = next((encoder for encoder in _ENCODERS if name.startswith(f"{encoder}.")), None)
        if encoder is not None:
            for inner, part in _of_encoder(name.removeprefix(f"{encoder}."), tensor):
                yield f"{_ENCODERS[encoder]}.{inner}", part
        elif name != "auxiliary.lm_head.weight" and not name.endswith(("._float_tensor", ".version")):
            yield _replaced(name, _HEADS), tensor  # the head's weight is the word embedding


def _of_encoder(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not name.startswith("layers."):
        yield _replaced(name, _EMBEDDINGS), tensor
        return
    _, number, inner = name.split(".", 2)
    if inner.startswith("self_attn.in_proj."):  # query, key and value in one
        for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            yield f"encoder.layer.{number}.attention.self.{part}.{inner.rsplit('.', 1)[1]}", third
    else:
        yield f"encoder.layer.{number}.{_replaced(inner, _LAYER)}", tensor


def _replaced(name: str, places: dict[str, str]) -> str:
    for theirs, ours in places.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name
