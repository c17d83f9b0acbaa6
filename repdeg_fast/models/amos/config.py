"""AMOS's configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, BertConfig

from repdeg_fast._checks import check_choice, check_finite, check_flag, check_integer, check_positive
from repdeg_fast.models.amos.encoders import AmosBertConfig, backbone_of, shallow

MIXTURES = ("learned", "equal", "random", "switch")
_COPIED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")  # of a backbone


class AmosConfig(AmosBertConfig):
    """The fields of ``BertConfig`` and :class:`AmosBertConfig`, which describe the discriminator, and:

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
        backbone: configuration of another kind of encoder, such as ``ModernBertConfig``, which then describes the
            discriminator instead of the fields of ``BertConfig``; see :mod:`repdeg_fast.models.amos.encoders`.
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
    backbone: Any = None

    @classmethod
    def published(cls, **changes: Any) -> AmosConfig:
        """The encoders of the authors' AMOS-base: relative positions in 32 buckets up to a distance of 128, no token
        types, LayerNorm's eps 1e-5. ``changes``: other fields, such as ``vocab_size``."""
        encoder = {"relative_position_buckets": 32, "relative_position_distance": 128, "token_types": False}
        return cls(**{**encoder, "layer_norm_eps": 1e-5, **changes})

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone, dict):  # JSON has no classes
            self.backbone = AutoConfig.for_model(**self.backbone)
        if self.backbone is not None:
            backbone_of(self.backbone)
            for name in _COPIED:
                setattr(self, name, getattr(self.backbone, name))
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

    def discriminator_config(self) -> Any:
        """A plain ``BertConfig`` where nothing beside is asked for."""
        if self.backbone is not None:
            return self.backbone
        kind = BertConfig if self.token_types and not self.relative_position_buckets else AmosBertConfig
        values = {field.name: getattr(self, field.name) for field in fields(kind)}
        return kind(**(values | {"architectures": None, "attn_implementation": self._attn_implementation}))

    def generator_config(self) -> Any:
        return shallow(self.discriminator_config(), self.mlm_layers[-1], self.generator_dropout)

    def head_of_backbone(self) -> tuple[str, float]:
        """Activation and LayerNorm's eps of the language-model head: the encoder's."""
        if self.backbone is None:
            return self.hidden_act, self.layer_norm_eps
        names = (("hidden_activation", "hidden_act"), ("norm_eps", "layer_norm_eps"))
        activation, eps = (next(getattr(self.backbone, n) for n in ns if hasattr(self.backbone, n)) for ns in names)
        return activation, eps
