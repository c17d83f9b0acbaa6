"""AMOS (arXiv 2204.03243): a discriminator trained on what a mixture of masked language models puts in place of masked
tokens, the mixture trained against the discriminator. On Hugging Face's BERT blocks; needs transformers 5.

Generator: one stack of layers with a language-model head, the same one, after layers such as 4, 6 and 8; no gradient
flows from one block of layers into the block below. Losses ℓ_k, k = 1 … K, one a head.
Mixture: α = softmax_k(v·f^(k)), f^(k) the output of block k; a token is sampled from the α-weighted sum of the K
logits.
Discriminator: sees the sampled tokens where masks were, and says of each position whether its token was replaced.

    loss = Σ_k ℓ_k + λ·RTD, λ = 50; v gets the reversed gradient of RTD, through the straight-through Gumbel-softmax
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._arithmetic import autocast_dtype
from repdeg_fast._checks import check_choice, check_finite, check_flag, check_integer, check_positive
from repdeg_fast.data import IGNORE_INDEX
from repdeg_fast.functional import mlm_losses_and_sample
from repdeg_fast.nn import GumbelMixture, MultiLayerMLMHead

try:
    from transformers import BertConfig, BertModel, BertPreTrainedModel
    from transformers.activations import ACT2FN
    from transformers.masking_utils import create_bidirectional_mask
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        f"repdeg_fast.models.amos needs transformers 5 ({error}): pip install 'repdeg-fast[hf]'"
    ) from error

MIXTURES = ("learned", "equal", "random", "switch")


class AmosConfig(BertConfig):
    """The fields of ``BertConfig``, which describe the discriminator, and:

    Args:
        mlm_layers: the layers of the generator with a language-model head, increasing; the last is its depth. One
            layer makes ELECTRA.
        rtd_weight: λ, the weight of the discriminator's loss.
        gumbel_temperature: τ.
        gradient_scale: −1 trains the mixture against the discriminator, 1 with it, 0 not at all.
        mixture: α is ``"learned"``; ``"equal"``; one layer, drawn anew for every masked position (``"random"``); or
            one layer, from the first to the last as training goes on (``"switch"``): set ``model.progress``.
        detach_mixture: the mixture's gradient goes into v only. Else it flows on into the generator, as in the
            published code.
        stop_gradient: between the generator's blocks.
        generator_dropout: the discriminator's dropout in the generator also; without any in the published code.
    """

    model_type = "amos"

    mlm_layers: tuple[int, ...] = (4, 6, 8)
    rtd_weight: float | int = 50.0
    gumbel_temperature: float | int = 0.3
    gradient_scale: float | int = -1.0
    mixture: str = "learned"
    detach_mixture: bool = False
    stop_gradient: bool = True
    generator_dropout: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.mlm_layers, (tuple, list)):
            raise TypeError(f"mlm_layers: expected a tuple of numbers of layers, got {self.mlm_layers!r:.60}")
        self.mlm_layers = tuple(self.mlm_layers)  # JSON has lists
        for place, layer in enumerate(self.mlm_layers):
            check_integer(f"mlm_layers[{place}]", layer)
        self._check()

    def _check(self) -> None:
        layers, depth = self.mlm_layers, self.num_hidden_layers
        if not layers or list(layers) != sorted({*layers}) or layers[0] < 1 or layers[-1] > depth:
            raise ValueError(
                f"mlm_layers: expected increasing numbers of layers from 1 to num_hidden_layers = {depth}, got {layers}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads = {self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        check_positive("gumbel_temperature", self.gumbel_temperature)
        check_finite("gradient_scale", self.gradient_scale)
        check_finite("rtd_weight", self.rtd_weight)
        if self.rtd_weight < 0:
            raise ValueError(f"rtd_weight: expected a number of at least 0, got {self.rtd_weight}")
        check_choice("mixture", self.mixture, MIXTURES)
        for name in ("detach_mixture", "stop_gradient", "generator_dropout"):
            check_flag(name, getattr(self, name))
        if self.is_decoder or not self.tie_word_embeddings:
            raise ValueError("is_decoder and tie_word_embeddings: expected False and True, AMOS has no other form")

    def discriminator_config(self) -> BertConfig:
        return self._bert_config()

    def generator_config(self) -> BertConfig:
        changes: dict[str, Any] = {"num_hidden_layers": self.mlm_layers[-1]}
        if not self.generator_dropout:
            changes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return self._bert_config(**changes)

    def _bert_config(self, **changes: Any) -> BertConfig:
        values = {field.name: getattr(self, field.name) for field in fields(BertConfig)}
        values |= {"architectures": None, "attn_implementation": self._attn_implementation}
        return BertConfig(**(values | changes))


@dataclass
class AmosOutput(ModelOutput):
    """What :class:`AmosForPreTraining` returns; without labels, ``rtd_logits`` only.

    loss: scalar, Σ mlm_losses + rtd_weight·rtd_loss.
    mlm_losses: (K,), the mean loss of each head over the masked positions.
    rtd_loss: scalar, the mean of the discriminator's loss over all positions that are not padding.
    rtd_accuracy: scalar, the share of them that it gets right (no gradient).
    replaced: scalar, the share of them that were replaced: one that always says "original" is right on the others.
    rtd_logits: (B, T), of "replaced".
    mixture_weights: (K,), α, the mean over the masked positions (no gradient).
    sampled_ids: (B, T), what the discriminator read: samples at masked positions.
    """

    loss: Tensor | None = None
    mlm_losses: Tensor | None = None
    rtd_loss: Tensor | None = None
    rtd_accuracy: Tensor | None = None
    replaced: Tensor | None = None
    rtd_logits: Tensor | None = None
    mixture_weights: Tensor | None = None
    sampled_ids: Tensor | None = None


class AmosGenerator(BertModel):
    """A BERT encoder that returns the outputs of some layers and stops the gradient behind each."""

    def __init__(self, config: BertConfig, mlm_layers: tuple[int, ...], stop_gradient: bool) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.mlm_layers, self.stop_gradient = mlm_layers, stop_gradient

    def forward(self, input_ids: Tensor, mask: Any, **inputs: Tensor | None) -> list[Tensor]:
        """K of (B, T, d); ``mask`` as the attention takes it."""
        hidden_states = self.embeddings(input_ids, **inputs)
        outputs = []
        for number, layer in enumerate(self.encoder.layer, start=1):
            hidden_states = layer(hidden_states, mask)
            if number in self.mlm_layers:
                outputs.append(hidden_states)
                if self.stop_gradient:
                    hidden_states = hidden_states.detach()
                    # a reentrant checkpoint trains the layer behind only if what goes in asks for a gradient
                    hidden_states.requires_grad_(bool(layer.gradient_checkpointing) and torch.is_grad_enabled())
        return outputs


class AmosForPreTraining(BertPreTrainedModel):
    """Generator, mixture and discriminator, trained together.

    Word embeddings are shared by the three; positions and the embedding's LayerNorm are the generator's own, as in the
    published code where the generator has no dropout. Only masked positions go through the language-model head, and
    no logits over the vocabulary are kept. Finding those positions stops a GPU's stream once a step, and nothing else
    does.

    Example::

        model = AmosForPreTraining(AmosConfig(vocab_size=len(tokenizer)))
        collator = MaskingCollator.from_tokenizer(tokenizer)
        model(**collator(examples)).loss.backward()
        model.discriminator_encoder().save_pretrained("encoder")  # a BertModel

    Attributes:
        progress: of the training, from 0 to 1; for ``mixture="switch"``. Not saved.
    """

    config_class = AmosConfig
    base_model_prefix = "discriminator"
    _tied_weights_keys = {  # noqa: RUF012 (as transformers declares it)
        "generator.embeddings.word_embeddings.weight": "discriminator.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: AmosConfig) -> None:
        if not isinstance(config, AmosConfig):
            raise TypeError(f"config: expected an AmosConfig, got {type(config).__name__}")
        super().__init__(config)
        self.discriminator = BertModel(config.discriminator_config(), add_pooling_layer=False)
        self.generator = AmosGenerator(config.generator_config(), config.mlm_layers, config.stop_gradient)
        self.mlm_head = MultiLayerMLMHead(
            config.hidden_size,
            self.discriminator.embeddings.word_embeddings,
            activation=ACT2FN[config.hidden_act],
            layer_norm_eps=config.layer_norm_eps,
        )
        self.mixture = None
        if config.mixture == "learned" and len(config.mlm_layers) > 1:
            learns = config.gradient_scale != 0
            self.mixture = GumbelMixture(config.hidden_size, detach_features=config.detach_mixture or not learns)
            self.mixture.requires_grad_(learns)
        self.rtd_head = nn.Linear(config.hidden_size, 1)
        self.progress = 0.0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.discriminator.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Take the weight of ``value``; the head's bias gets as long (``resize_token_embeddings`` comes here)."""
        words: Any = self.get_input_embeddings()
        bias: Any = self.mlm_head.bias
        words.weight, words.num_embeddings = value.weight, len(value.weight)
        self.mlm_head.bias = nn.Parameter(F.pad(bias.detach(), (0, len(value.weight) - len(bias))))
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        token_type_ids: Tensor | None = None,  # (B, T)
        position_ids: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        seed: int | Tensor | None = None,
    ) -> AmosOutput:
        """One step of pretraining; without ``labels``, the discriminator's view of ``input_ids``.

        Args:
            input_ids: with mask tokens, as :class:`repdeg_fast.data.MaskingCollator` makes them.
            attention_mask: 0 at padding. Leave it out where there is none: attention is faster without.
            labels: the token at masked positions, −100 elsewhere.
            seed: of the sample, as in :func:`repdeg_fast.gumbel_mix`.
        """
        inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        _check_inputs(input_ids, attention_mask, token_type_ids, position_ids, labels)
        embeddings = self.get_input_embeddings()(input_ids)
        mask = self._attention_mask(embeddings, attention_mask)
        if labels is None:
            return AmosOutput(rtd_logits=self._discriminate(embeddings, mask, inputs))

        positions = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)  # the one wait
        layers = self.generator(input_ids, mask, **inputs)
        features = torch.stack([layer.flatten(0, 1).index_select(0, positions) for layer in layers])
        target = labels.reshape(-1).index_select(0, positions)
        mlm_losses, mixture_weights, tokens, samples = self._generate(features, target, seed)

        flat = embeddings.flatten(0, 1).index_copy(0, positions, samples)
        rtd_logits = self._discriminate(flat.view_as(embeddings), mask, inputs)
        sampled_ids = input_ids.reshape(-1).index_copy(0, positions, tokens.to(input_ids.dtype)).view_as(input_ids)
        replaced = sampled_ids != torch.where(labels == IGNORE_INDEX, input_ids, labels)
        rtd_loss, accuracy, share = _judge(rtd_logits, replaced, attention_mask)
        return AmosOutput(
            loss=mlm_losses.sum() + self.config.rtd_weight * rtd_loss,
            mlm_losses=mlm_losses,
            rtd_loss=rtd_loss,
            rtd_accuracy=accuracy,
            replaced=share,
            rtd_logits=rtd_logits,
            mixture_weights=mixture_weights,
            sampled_ids=sampled_ids,
        )

    def discriminator_encoder(self, add_pooling_layer: bool = False) -> BertModel:
        """A copy of the discriminator without its head, for fine-tuning. A pooling layer would be a new one."""
        encoder = BertModel(self.config.discriminator_config(), add_pooling_layer)
        encoder.embeddings.load_state_dict(self.discriminator.embeddings.state_dict())
        encoder.encoder.load_state_dict(self.discriminator.encoder.state_dict())
        return nn.Module.to(encoder, self.device, self.dtype).train(self.training)

    def _generate(
        self, features: Tensor, target: Tensor, seed: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From the K layers' outputs (K, M, d) at the masked positions: losses (K,), mean mixture weights (K,), sampled
        tokens (M,) and their embeddings (M, d)."""
        head = self.mlm_head
        hidden_states = head.transform(features)
        if dtype := autocast_dtype(features.device):  # LayerNorm leaves it in float32
            hidden_states = hidden_states.to(dtype)
        mixture_logits = self._mixture_logits(features)
        losses, tokens, embeddings = mlm_losses_and_sample(
            hidden_states, mixture_logits, head.weight, target, head.bias, padding_idx=head.padding_idx,
            temperature=self.config.gumbel_temperature, gradient_scale=self.config.gradient_scale, seed=seed,
        )  # fmt: skip
        weights = _wide(mixture_logits.detach()).softmax(dim=1).sum(dim=0) / max(len(target), 1)
        return losses, weights, tokens, embeddings

    def _mixture_logits(self, features: Tensor) -> Tensor:
        """(M, K)."""
        if self.mixture is not None:
            return self.mixture.mixture_logits(features)
        heads, positions, _ = features.shape
        if self.config.mixture in ("equal", "learned"):  # learned, of a single layer
            return features.new_zeros(positions, heads)
        if self.config.mixture == "random":
            head = torch.randint(heads, (positions, 1), device=features.device)
        else:
            head = torch.full((positions, 1), self._switched_head(heads), device=features.device)
        return features.new_full((positions, heads), -math.inf).scatter(1, head, 0.0)

    def _switched_head(self, heads: int) -> int:
        if not 0 <= self.progress <= 1:
            raise ValueError(f"progress: expected a number from 0 to 1, got {self.progress}")
        return min(int(self.progress * heads), heads - 1)

    def _attention_mask(self, embeddings: Tensor, attention_mask: Tensor | None) -> Any:
        """As the attention takes it, for both encoders. Made here because each of them would look first whether there
        is any padding, and a GPU's stream would stop."""
        if attention_mask is None:
            return None
        return create_bidirectional_mask(self.config, embeddings, attention_mask, allow_is_bidirectional_skip=False)

    def _discriminate(self, embeddings: Tensor, mask: Any, inputs: dict[str, Any]) -> Tensor:
        """(B, T, d) → (B, T), in float32 at least."""
        output = self.discriminator(inputs_embeds=embeddings, attention_mask=mask, **inputs)
        logits = self.rtd_head(output.last_hidden_state).squeeze(2)
        return _wide(logits)


def _judge(rtd_logits: Tensor, replaced: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the positions that are not padding: the loss, what was right, and what was replaced."""
    counted = torch.ones_like(rtd_logits) if attention_mask is None else attention_mask.to(rtd_logits.dtype)
    number = counted.sum().clamp(min=1)
    loss = F.binary_cross_entropy_with_logits(rtd_logits, replaced.to(rtd_logits), counted, reduction="sum")
    right = (rtd_logits > 0) == replaced
    return loss / number, (right * counted).sum() / number, (replaced * counted).sum() / number


def _check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        given = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected a tensor of shape (B, T), got {given}")
    others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
    for name, value in {**others, "labels": labels}.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
        # positions may be those of one row
        if value is not None and value.shape != input_ids.shape and (name, len(value)) != ("position_ids", 1):
            raise ValueError(
                f"{name}: expected shape {tuple(input_ids.shape)} like input_ids, got {tuple(value.shape)}"
            )
    indices = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids, "labels": labels}
    for name, value in indices.items():
        if value is not None and value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
