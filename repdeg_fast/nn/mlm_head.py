"""The masked-language-model head that several layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repdeg_fast._checks import (
    check_flag,
    check_floating,
    check_input,
    check_positive,
    check_size,
    is_dtensor,
)
from repdeg_fast.functional import multi_layer_mlm_loss
from repdeg_fast.functional._head_arguments import check_target
from repdeg_fast.functional.linear_cross_entropy import CrossEntropyOutput

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class MultiLayerMLMHead(nn.Module):
    """Masked-language-model losses of K layers through one head: dense → activation → LayerNorm → tied projection
    (AMOS, arXiv 2204.03243, equation 4; Condenser, arXiv 2104.08253, equation 6; K = 1 is BERT's head).

    Only masked positions are transformed and projected, and no logits are kept: see
    :func:`repdeg_fast.multi_layer_mlm_loss`.

    Example::

        head = MultiLayerMLMHead(768, model.get_input_embeddings())
        layers = model(input_ids, output_hidden_states=True).hidden_states
        losses = head([layers[4], layers[6], layers[8]], labels)
        losses.sum().backward()

    The weight of ``embedding`` is used where it lies and stays its owner's: it is not among the head's parameters, nor
    in its ``state_dict``. So a model that holds both saves it once and gives it to the optimizer once, and an
    embedding whose weight is moved, loaded or replaced (``to``, ``load_state_dict``, FSDP) stays tied.

    Args:
        hidden_size: width of the hidden states. The dense layer maps it to the width of the embedding.
        embedding: ``nn.Embedding`` or ``nn.Linear``, or the (V, width) parameter itself. The ``padding_idx`` row of an
            ``nn.Embedding`` gets no gradient here either. The bias of an ``nn.Linear`` is not used.
        activation: ``"gelu"``, ``"relu"``, ``"silu"``, ``"tanh"`` or a function of a tensor.
        layer_norm_eps: as BERT has it; RoBERTa has 1e-5.
        bias: one learned value a word, added to the logits.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding: nn.Embedding | nn.Linear | nn.Parameter,
        *,
        activation: str | Activation = "gelu",
        layer_norm_eps: float = 1e-12,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_positive("layer_norm_eps", layer_norm_eps)
        check_flag("bias", bias)
        self._tied = (_check_embedding(embedding),)  # in a tuple, which nn.Module does not look into
        vocabulary, width = self.weight.shape
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.dense = nn.Linear(hidden_size, width, **like)
        self.activation = _check_activation(activation)
        self.layer_norm = nn.LayerNorm(width, layer_norm_eps, **like)
        self.bias = nn.Parameter(torch.zeros(vocabulary, **like)) if bias else None

    @property
    def weight(self) -> Tensor:
        """(V, width): the tied parameter, as the embedding has it now; gathered, where FSDP2 cuts the embedding by
        itself."""
        (embedding,) = self._tied
        if not isinstance(embedding, nn.Module):
            return embedding
        weight: Tensor = embedding.weight
        if not is_dtensor(weight):
            return weight
        from repdeg_fast.distributed.fsdp import whole_weight

        return whole_weight(embedding, weight)

    @property
    def padding_idx(self) -> int | None:
        return getattr(self._tied[0], "padding_idx", None)

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],  # K of (B, T, hidden_size), or (K, B, T, hidden_size)
        target: Tensor,  # (B, T)
        *,
        ignore_index: int = -100,
        **options: Any,
    ) -> Tensor | CrossEntropyOutput:
        """The mean loss of each layer over the masked positions, (K,), in float32 (float64 for float64 inputs).

        Finding those positions stops a GPU's stream once, whatever K is; nothing else here does.

        Args:
            hidden_states: K tensors of shape (B, T, hidden_size), in a sequence or stacked, in the dtype of the head
                outside autocast. (B, T) may be any shape.
            target: (B, T), int64 or int32: the word at masked positions, ``ignore_index`` elsewhere.
            options: those of :func:`repdeg_fast.multi_layer_mlm_loss` but for ``padding_idx``. With
                ``reduction="none"``, the losses are (K, masked); so are predictions, always.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        options.update(ignore_index=ignore_index, padding_idx=self.padding_idx)
        return masked_lm_losses(hidden_states, target, self.transform, self.weight, self.bias, **options)

    def transform(self, hidden_states: Tensor) -> Tensor:
        """What is multiplied with the embedding: (..., hidden_size) → (..., width)."""
        check_input("hidden_states", hidden_states, self.dense.weight)
        return self.layer_norm(self.activation(self.dense(hidden_states)))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) → (..., V), for predictions."""
        hidden_states, weight = self.transform(hidden_states), self.weight
        if not is_dtensor(weight):
            return F.linear(hidden_states, weight, self.bias)
        from repdeg_fast.distributed.style import vocabulary_logits

        return vocabulary_logits(hidden_states, weight, self.bias)

    def extra_repr(self) -> str:
        return f"tied to {self._tied[0]!r}" if isinstance(self._tied[0], nn.Module) else f"V={len(self.weight)}"


def masked_lm_losses(
    hidden_states: Tensor | Sequence[Tensor],  # K of (B, T, hidden), or (K, B, T, hidden)
    target: Tensor,  # (B, T)
    transform: Callable[[Tensor], Tensor],  # (K, M, hidden) → (K, M, width)
    weight: Tensor,  # (V, width)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor | CrossEntropyOutput:
    """:func:`repdeg_fast.multi_layer_mlm_loss` of the M positions that are not ignored, selected before the transform.
    ``nonzero`` is the one operation whose result the host waits for."""
    check_target(target, ignore_index)
    layers = _check_layers(hidden_states, target)
    positions = (target.reshape(-1) != ignore_index).nonzero().squeeze(1)
    masked = torch.stack([layer.flatten(0, -2).index_select(0, positions) for layer in layers])
    target = target.reshape(-1).index_select(0, positions)
    return multi_layer_mlm_loss(transform(masked), weight, target, bias, ignore_index=ignore_index, **options)


def _check_embedding(embedding: Any) -> nn.Embedding | nn.Linear | nn.Parameter:
    weight = getattr(embedding, "weight", None) if isinstance(embedding, nn.Module) else embedding
    if not isinstance(weight, Tensor):
        raise TypeError(
            "embedding: expected nn.Embedding, nn.Linear or a parameter of shape (V, d), "
            f"got {type(embedding).__name__}"
        )
    check_floating("embedding", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"embedding: expected 2 dimensions (V, d), neither of them 0, got shape {tuple(weight.shape)}")
    return embedding


def _check_activation(activation: str | Activation) -> Activation:
    if callable(activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected a function or one of {names}, got {activation!r:.60}")
    return ACTIVATIONS[activation]


def _check_layers(hidden_states: Tensor | Sequence[Tensor], target: Tensor) -> list[Tensor]:
    if not isinstance(hidden_states, Iterable):
        raise TypeError(
            "hidden_states: expected a sequence of tensors (B, T, hidden_size), one a layer, or all in one tensor, got "
            f"{type(hidden_states).__name__}"
        )
    if isinstance(hidden_states, Tensor) and hidden_states.dim() < 2:
        shape = tuple(hidden_states.shape)
        raise ValueError(f"hidden_states: expected shape (K, ..., hidden_size), got {shape}")
    layers = list(hidden_states)
    if not layers:
        raise ValueError("hidden_states: expected at least one tensor, got none")
    for i, layer in enumerate(layers):
        check_floating(f"hidden_states[{i}]", layer)
        if layer.shape[:-1] != target.shape or layer.shape != layers[0].shape:
            raise ValueError(
                f"hidden_states[{i}]: expected shape {(*target.shape, layers[0].shape[-1])}, that of target and the "
                f"width of hidden_states[0], got {tuple(layer.shape)}; a single layer is passed as [hidden_states]"
            )
        if layer.device != target.device:
            raise ValueError(f"hidden_states[{i}]: expected device {target.device} like target, got {layer.device}")
    return layers
