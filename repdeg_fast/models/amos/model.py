"""The model of AMOS: :mod:`repdeg_fast.models.amos`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from repdeg_fast import _ranks
from repdeg_fast._arithmetic import autocast_dtype
from repdeg_fast.data import IGNORE_INDEX
from repdeg_fast.functional import mlm_losses_and_sample
from repdeg_fast.models.amos.config import AmosConfig
from repdeg_fast.models.amos.encoders import backbone_of, make_generator, make_model
from repdeg_fast.nn import GumbelMixture, MultiLayerMLMHead


@dataclass
class AmosOutput(ModelOutput):
    """What :class:`AmosForPreTraining` returns; without labels, ``rtd_logits`` only.

    Attributes:
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


class AmosForPreTraining(PreTrainedModel):
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
        data_parallel_group: the ranks that share a batch; all ranks unless given. Not saved.
    """

    config_class = AmosConfig
    base_model_prefix = "discriminator"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # else a Trainer that accumulates gradients leaves the division to the model
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: AmosConfig) -> None:
        if not isinstance(config, AmosConfig):
            raise TypeError(f"config: expected an AmosConfig, got {type(config).__name__}")
        super().__init__(config)
        self.discriminator = make_model(config.discriminator_config())
        self.generator = make_generator(config.generator_config(), config.mlm_layers, config.stop_gradient)
        words = _name_of(self.discriminator.get_input_embeddings(), self.discriminator)
        self._tied_weights_keys = {f"generator.{words}.weight": f"discriminator.{words}.weight"}
        activation, eps = config.head_of_backbone()
        embedding: Any = self.get_input_embeddings()
        self.mlm_head = MultiLayerMLMHead(
            config.hidden_size, embedding, activation=ACT2FN[activation], layer_norm_eps=eps
        )
        self.mixture = None
        if config.mixture == "learned" and len(config.mlm_layers) > 1:
            learns = config.gradient_scale != 0
            self.mixture = GumbelMixture(config.hidden_size, detach_features=config.detach_mixture or not learns)
            self.mixture.requires_grad_(learns)
        self.rtd_head = nn.Linear(config.hidden_size, 1)
        self.progress, self.data_parallel_group = 0.0, None
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
        **attention: Any,
    ) -> AmosOutput:
        """One step of pretraining; without ``labels``, the discriminator's view of ``input_ids``.

        Args:
            input_ids: with mask tokens, as :class:`repdeg_fast.data.MaskingCollator` makes them.
            attention_mask: 0 at padding. Leave it out where there is none: attention is faster without.
            labels: the token at masked positions, −100 elsewhere.
            position_ids: of ModernBERT: sequences packed into a row begin at position 0 each, and see nothing of one
                another (``DataCollatorWithFlattening``).
            seed: of the sample, as in :func:`repdeg_fast.gumbel_mix`.
            attention: what else the encoders' attention takes, such as the lengths of packed sequences.

        Under ``torch.distributed`` the losses in training are weighted by this rank's share of all masked positions,
        the discriminator's by its share of all that are not padding, times the number of ranks: averaged gradients are
        then those of one large batch. From one seed on all ranks, so are the samples.
        """
        _check_inputs(input_ids, attention_mask, token_type_ids, position_ids, labels)
        inputs = self._encoder_inputs(token_type_ids=token_type_ids, position_ids=position_ids)
        embeddings = self.get_input_embeddings()(input_ids)
        encoder = self.discriminator.config
        mask = backbone_of(encoder).mask(encoder, embeddings, attention_mask, inputs)
        inputs |= attention
        if labels is None:
            return AmosOutput(rtd_logits=self._discriminate(embeddings, mask, inputs))

        positions = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)  # the one wait
        layers = self.generator(input_ids, mask, **inputs)
        features = torch.stack([layer.flatten(0, 1).index_select(0, positions) for layer in layers])
        target = labels.reshape(-1).index_select(0, positions)
        masked, read = self._shares(target, input_ids, attention_mask)
        mlm_losses, mixture_weights, tokens, samples = self._generate(features, target, seed, masked.before)

        flat = embeddings.flatten(0, 1).index_copy(0, positions, samples)
        rtd_logits = self._discriminate(flat.view_as(embeddings), mask, inputs)
        sampled_ids = input_ids.reshape(-1).index_copy(0, positions, tokens.to(input_ids.dtype)).view_as(input_ids)
        replaced = sampled_ids != torch.where(labels == IGNORE_INDEX, input_ids, labels)
        rtd_loss, accuracy, share = _judge(rtd_logits, replaced, attention_mask)
        return AmosOutput(
            loss=masked.weight * mlm_losses.sum() + self.config.rtd_weight * read.weight * rtd_loss,
            mlm_losses=mlm_losses,
            rtd_loss=rtd_loss,
            rtd_accuracy=accuracy,
            replaced=share,
            rtd_logits=rtd_logits,
            mixture_weights=mixture_weights,
            sampled_ids=sampled_ids,
        )

    def discriminator_encoder(self, add_pooling_layer: bool = False) -> Any:
        """A copy of the discriminator without its head, for fine-tuning: a ``BertModel``; an ``AmosBertModel`` where it
        has relative positions or no token types; or a model of its backbone. A pooling layer, which BERT alone can
        have, would be a new one."""
        encoder = make_model(
            self.config.discriminator_config(), **({"add_pooling_layer": True} if add_pooling_layer else {})
        )
        encoder.load_state_dict(self.discriminator.state_dict(), strict=not add_pooling_layer)
        return nn.Module.to(encoder, self.device, self.dtype).train(self.training)

    def _encoder_inputs(self, **inputs: Tensor | None) -> dict[str, Any]:
        taken = backbone_of(self.discriminator.config).inputs
        for name, value in inputs.items():
            if value is not None and name not in taken:
                raise ValueError(f"{name}: expected None, {type(self.discriminator).__name__} takes none")
        return {name: inputs[name] for name in taken}

    def _shares(
        self, target: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[_ranks.Share, _ranks.Share]:
        """This rank's part of all masked positions, and of all that are not padding."""
        group = self.data_parallel_group
        if not self.training or _ranks.number(group) == 1:
            return _ranks.Share(0, 1, 1, 1), _ranks.Share(0, 1, 1, 1)
        read = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
        masked, all_read = _ranks.shares([len(target), read], target.device, group)
        return masked, all_read

    def _generate(
        self, features: Tensor, target: Tensor, seed: int | Tensor | None, first_position: int
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
            first_position=first_position,
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

    def _discriminate(self, embeddings: Tensor, mask: Any, inputs: dict[str, Any]) -> Tensor:
        """(B, T, d) → (B, T), in float32 at least."""
        output = self.discriminator(inputs_embeds=embeddings, attention_mask=mask, **inputs)
        logits = self.rtd_head(output.last_hidden_state).squeeze(2)
        return _wide(logits)


def _name_of(module: nn.Module, model: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


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
