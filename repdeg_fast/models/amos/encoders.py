"""The encoders that AMOS is built on: BERT, BERT with the published model's relative positions, ModernBERT.

What AMOS needs of a backbone is a :class:`Backbone`. Another one is one entry more in :data:`BACKBONES`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, ModernBertConfig, ModernBertModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from repdeg_fast._arithmetic import autocast_dtype
from repdeg_fast._checks import check_flag, check_integer


class AmosBertConfig(BertConfig):
    """BERT's, and:

    Args:
        relative_position_buckets: of a learned bias of the attention a head, shared by all layers, for the distance
            between two positions: half of them a direction, the first half of those a position each, the others
            growing like a logarithm. 0: none; the published AMOS has 32.
        relative_position_distance: from which on distances share the last bucket.
        token_types: whether there are embeddings of token types; not in the published AMOS.
    """

    model_type = "amos_bert"

    relative_position_buckets: int = 0
    relative_position_distance: int = 128
    token_types: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_flag("token_types", self.token_types)
        buckets, distance = self.relative_position_buckets, self.relative_position_distance
        check_integer("relative_position_buckets", buckets)
        check_integer("relative_position_distance", distance)
        if buckets and (buckets < 4 or buckets % 2):
            raise ValueError(f"relative_position_buckets: expected 0, or an even number of at least 4, got {buckets}")
        if buckets and distance <= buckets // 4 + 1:
            raise ValueError(
                f"relative_position_distance: expected more than a quarter of the {buckets} buckets, got {distance}"
            )


class AmosBertModel(BertModel):
    """BERT with what :class:`AmosBertConfig` has beside BERT's own. ``AutoModel`` knows it once this is imported."""

    config_class = AmosBertConfig

    def __init__(self, config: AmosBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer)
        if not config.token_types:
            self.embeddings.token_type_embeddings = _NoEmbedding()  # type: ignore[assignment]
        self.relative_positions = None
        if config.relative_position_buckets:
            self.relative_positions = nn.Embedding(config.relative_position_buckets, config.num_attention_heads)
            self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        like = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self.biased(padding_mask(self.config, like, attention_mask, {}), like)
        return super().forward(
            attention_mask=mask, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=like, **kwargs
        )

    def biased(self, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """``mask`` (B, 1, T, T), true where attention goes, and the bias of the distances: (B or 1, heads, T, T)."""
        if self.relative_positions is None:
            return mask
        whole = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
        if not whole or "flash" in str(self.config._attn_implementation):
            raise ValueError(
                "attn_implementation: expected sdpa or eager, whose attention takes a bias, got "
                f"{self.config._attn_implementation}"
            )
        length, weight = like.shape[1], self.relative_positions.weight
        positions = torch.arange(length, device=like.device)
        buckets = relative_position_bucket(
            positions - positions[:, None], len(weight), self.config.relative_position_distance
        )
        dtype = autocast_dtype(like.device) or like.dtype
        bias = F.embedding(buckets, weight).permute(2, 0, 1)[None].to(dtype)
        if mask is None:
            return bias.contiguous()
        return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


def relative_position_bucket(distance: Tensor, buckets: int, most: int) -> Tensor:
    """Of signed distances, 0 … buckets − 2: exact up to a quarter of the buckets, then logarithmic up to ``most``."""
    half = buckets // 2
    exact = half // 2
    far = distance.abs().clamp(min=exact).float() / exact
    steps = torch.ceil(far.log() / math.log((most - 1) / exact) * (half - 1 - exact)).long()
    bucket = torch.where(distance.abs() < exact, distance.abs(), (exact + steps).clamp(max=half - 1))
    return bucket * distance.sign() + half - 1


class _NoEmbedding(nn.Module):
    def forward(self, ids: Tensor) -> float:
        return 0.0


class _Blocks:
    """Makes an encoder AMOS's generator: the outputs of some layers, the gradient stopped behind each."""

    mlm_layers: tuple[int, ...]
    stop_gradient: bool

    def forward(self, input_ids: Tensor, mask: Any, **inputs: Tensor | None) -> list[Tensor]:
        """K of (B, T, d); ``mask`` as :meth:`Backbone.mask` makes it."""
        hidden_states, layers = self._begin(input_ids, mask, inputs)
        outputs = []
        for number, (layer, arguments) in enumerate(layers, start=1):
            hidden_states = layer(hidden_states, *arguments)
            if number in self.mlm_layers:
                outputs.append(self._end(hidden_states))
                if self.stop_gradient:
                    hidden_states = hidden_states.detach()
                    # a reentrant checkpoint trains the layer behind only if what goes in asks for a gradient
                    hidden_states.requires_grad_(bool(layer.gradient_checkpointing) and torch.is_grad_enabled())
        return outputs

    def _begin(self, input_ids: Tensor, mask: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[tuple[Any, tuple]]]:
        """The embeddings, and each layer with what it takes beside hidden states."""
        raise NotImplementedError

    def _end(self, hidden_states: Tensor) -> Tensor:
        """What a head reads: normalized, where the layers do not do it."""
        return hidden_states


class BertGenerator(_Blocks, BertModel):
    def _begin(self, input_ids: Tensor, mask: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[tuple[Any, tuple]]]:
        return self.embeddings(input_ids, **inputs), [(layer, (mask,)) for layer in self.encoder.layer]


class AmosBertGenerator(_Blocks, AmosBertModel):  # type: ignore[misc]  # another forward
    def _begin(self, input_ids: Tensor, mask: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[tuple[Any, tuple]]]:
        hidden_states = self.embeddings(input_ids, **inputs)
        mask = self.biased(mask, hidden_states)
        return hidden_states, [(layer, (mask,)) for layer in self.encoder.layer]


class ModernBertGenerator(_Blocks, ModernBertModel):
    def _begin(self, input_ids: Tensor, mask: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[tuple[Any, tuple]]]:
        hidden_states = self.embeddings(input_ids)
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        kinds = [str(layer.attention_type) for layer in self.layers]
        rotations = {kind: self.rotary_emb(hidden_states, positions, kind) for kind in {*kinds}}
        return hidden_states, [
            (layer, (mask[kind], rotations[kind])) for layer, kind in zip(self.layers, kinds, strict=True)
        ]

    def _end(self, hidden_states: Tensor) -> Tensor:
        return self.final_norm(hidden_states)


def padding_mask(config: Any, embeddings: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]) -> Any:
    """Made once a step, for both encoders: each of them would look first whether there is any padding, and a GPU's
    stream would stop."""
    if attention_mask is None:
        return None
    return create_bidirectional_mask(config, embeddings, attention_mask, allow_is_bidirectional_skip=False)


def _modern_bert_masks(
    config: Any, embeddings: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]
) -> dict[str, Any]:
    """One for layers that see all positions and one for those that see near ones. Sequences packed into a row, told
    apart by their positions, each of which begins at 0, see nothing of one another (transformers leaves that to flash
    attention, which reads their lengths from the arguments that ``DataCollatorWithFlattening`` adds)."""
    positions: Tensor | None = inputs.get("position_ids")
    arguments: dict[str, Any] = {"allow_is_bidirectional_skip": attention_mask is None}
    if positions is not None and "flash" not in str(config._attn_implementation):
        sequence = (positions == 0).cumsum(dim=1).expand(len(embeddings), -1)

        def together(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sequence[batch, query] == sequence[batch, key]

        arguments = {"and_mask_function": together, "allow_is_bidirectional_skip": False}
    return {
        "full_attention": create_bidirectional_mask(config, embeddings, attention_mask, **arguments),
        "sliding_attention": create_bidirectional_sliding_window_mask(config, embeddings, attention_mask, **arguments),
    }


class Backbone(NamedTuple):
    """What AMOS needs of an encoder of transformers.

    model: the discriminator, called with ``inputs_embeds``, a mask and positions; has ``get_input_embeddings``.
    generator: the same with :class:`_Blocks` mixed in: how its layers are called one by one.
    mask: (configuration, embeddings, attention mask, inputs) → what both take as their mask.
    inputs: names of what ``model`` takes beside, of token types, positions, lengths.
    """

    model: type[Any]
    generator: type[Any]
    mask: Callable[[Any, Tensor, Tensor | None, dict[str, Any]], Any]
    inputs: tuple[str, ...]


BACKBONES: dict[type, Backbone] = {
    BertConfig: Backbone(BertModel, BertGenerator, padding_mask, ("token_type_ids", "position_ids")),
    AmosBertConfig: Backbone(AmosBertModel, AmosBertGenerator, padding_mask, ("token_type_ids", "position_ids")),
    ModernBertConfig: Backbone(ModernBertModel, ModernBertGenerator, _modern_bert_masks, ("position_ids",)),
}

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "embedding_dropout",
    "mlp_dropout",
    "attention_dropout",
)


def backbone_of(config: Any) -> Backbone:
    if type(config) not in BACKBONES:
        known = ", ".join(cls.__name__ for cls in BACKBONES)
        raise TypeError(f"backbone: expected a configuration of {known} (see Backbone), got {type(config).__name__}")
    return BACKBONES[type(config)]


def make_model(config: Any, **options: Any) -> Any:
    """The encoder without a pooling layer, unless asked for one."""
    cls = backbone_of(config).model
    if isinstance(config, BertConfig):
        options = {"add_pooling_layer": False} | options
    return cls(config, **options)


def make_generator(config: Any, mlm_layers: tuple[int, ...], stop_gradient: bool) -> Any:
    options = {"add_pooling_layer": False} if isinstance(config, BertConfig) else {}
    generator = backbone_of(config).generator(config, **options)
    generator.mlm_layers, generator.stop_gradient = mlm_layers, stop_gradient
    return generator


def shallow(config: Any, layers: int, dropout: bool) -> Any:
    """``config`` with that many layers, and without dropout unless it is wanted."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    for name in () if dropout else _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


AutoConfig.register("amos_bert", AmosBertConfig)
AutoModel.register(AmosBertConfig, AmosBertModel)
