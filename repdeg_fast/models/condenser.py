"""Condenser (arXiv 2104.08253) and coCondenser (arXiv 2108.05540): pretraining that makes the CLS vector of an encoder
carry a text. On BERT and RoBERTa of transformers 5.

A head of a few more layers predicts the masked words from the CLS of the encoder's *last* layer and all other positions
of an *early* one; what the early layers do not know has to come through the CLS:

    h = head([h_CLS^late ; h_1..T^early]),    loss = MLM(h)  (+ MLM(h^late) where late_mlm)

coCondenser adds a contrastive loss: of two spans of one text, the late CLS of one is to be found by that of the other
among all spans of the batch (:func:`repdeg_fast.span_pair_loss`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from repdeg_fast import _ranks
from repdeg_fast._checks import check_flag, check_integer, check_size
from repdeg_fast.data import IGNORE_INDEX
from repdeg_fast.functional import span_pair_loss
from repdeg_fast.training import Encoded

try:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForMaskedLM, BertForMaskedLM, RobertaForMaskedLM
    from transformers.masking_utils import create_bidirectional_mask
    from transformers.utils import ModelOutput

    from repdeg_fast.integrations.huggingface import HuggingFaceHead, mlm_losses
except ImportError as error:
    raise ImportError(
        f"repdeg_fast.models.condenser needs transformers 5 ({error}): pip install 'repdeg-fast[hf]'"
    ) from error

SETTINGS, HEAD = "condenser.json", "condenser_head.safetensors"  # beside the encoder's own files

Condenser = TypeVar("Condenser", bound="CondenserForPreTraining")


@dataclass
class CondenserOutput(ModelOutput):
    """What the models here return; losses are there where labels were given.

    Attributes:
        loss: scalar, the sum of the others; of several ranks in training weighted by what each has masked of all.
        head_loss: scalar, masked-language-model loss after the head.
        late_loss: scalar, the encoder's own, where ``late_mlm``.
        contrastive_loss: scalar, of coCondenser: times the number of ranks, which averaging gradients undoes.
        cls: (B, d), the CLS of the encoder's last layer.
        last_hidden_state: (B, T, d), of the encoder.
        hidden_states: of the encoder, the embeddings first, where ``output_hidden_states`` was given.
    """

    loss: Tensor | None = None
    head_loss: Tensor | None = None
    late_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    cls: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CondenserForPreTraining(nn.Module):
    """A masked language model with Condenser's head, which is thrown away after pretraining.

    Only masked positions go through the language-model head, which both losses share, and no logits are kept.

    ``Trainer`` trains it. Its checkpoints, for ``resume_from_checkpoint``, are state dicts, which have a tied weight
    once. What others load is written by :meth:`save_pretrained`.

    Example::

        bert = BertForMaskedLM.from_pretrained("bert-base-uncased")
        model = CondenserForPreTraining(bert, skip_from=6, late_mlm=True)
        model(**SpanCollator(tokenizer)(spans)).loss.backward()
        model.save_pretrained("condenser")  # AutoModel.from_pretrained("condenser") is the encoder

    Args:
        model: ``BertForMaskedLM`` or ``RobertaForMaskedLM``, with ``huggingface.apply`` or without.
        n_head_layers: layers of the head, initialized as the model initializes its own.
        skip_from: where the head's other positions come from: an index of the hidden states, 0 the embeddings. The
            published recipe for BERT-base has 6. The last layer is taken, too, as by the published code, though nothing
            is skipped then: the head's CLS need not hold what other positions know as well.
        late_mlm: add the encoder's own masked-language-model loss. The published recipe does.

    Attributes:
        model: the masked language model.
        head: ``nn.ModuleList`` of encoder layers.

    Raises:
        TypeError: another kind of model.
        ValueError: no head layer, or ``skip_from`` outside the encoder.
    """

    model: Any
    head: Any
    accepts_loss_kwargs = False  # else a Trainer that accumulates gradients leaves the division to the model

    def __init__(self, model: nn.Module, *, n_head_layers: int = 2, skip_from: int = 2, late_mlm: bool = False) -> None:
        super().__init__()
        if not isinstance(model, (BertForMaskedLM, RobertaForMaskedLM)):
            raise TypeError(
                "model: expected a masked-language model, BertForMaskedLM or RobertaForMaskedLM of transformers, got "
                f"{type(model).__name__}"
            )
        check_size("n_head_layers", n_head_layers)
        check_integer("skip_from", skip_from)
        check_flag("late_mlm", late_mlm)
        base: Any = model.base_model
        layers = base.encoder.layer
        if not 0 <= skip_from <= len(layers):
            raise ValueError(
                f"skip_from: expected a layer of the encoder, from 0 (embeddings) to {len(layers)}, got {skip_from}"
            )
        self.model, self.skip_from, self.late_mlm = model, skip_from, late_mlm
        self.head = nn.ModuleList(type(layers[0])(model.config) for _ in range(n_head_layers))
        self.head.apply(model._init_weights)
        self.head.to(model.device, model.dtype).train(model.training)
        self.register_state_dict_post_hook(_leave_out_tied)
        self.register_load_state_dict_pre_hook(_fill_in_tied)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        token_type_ids: Tensor | None = None,  # (B, T)
        position_ids: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        **inputs: Any,
    ) -> CondenserOutput:
        """Called like the model itself.

        Args:
            labels: the token at masked positions, −100 elsewhere, at the CLS too. Without: no losses.
            inputs: what else the encoder takes, and ``output_hidden_states``.

        Raises:
            ValueError: a label on the CLS, whose word the head could not but copy (looked for on a CPU only);
                ``return_dict=False``.

        Under ``torch.distributed`` the loss in training is weighted by this rank's share of all masked positions, times
        the number of ranks: averaged gradients are then those of one large batch.
        """
        output = self._losses(input_ids, attention_mask, token_type_ids, position_ids, labels, **inputs)
        if output.loss is not None:
            output.loss = self._weight(labels) * output.loss
        return output

    def _weight(self, labels: Tensor | None) -> float:
        """Of this rank."""
        if labels is None or not self.training or _ranks.number() == 1:
            return 1.0
        return _ranks.shares([int((labels != IGNORE_INDEX).sum())], labels.device)[0].weight

    def _losses(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, labels: Tensor | None, **inputs: Any,
    ) -> CondenserOutput:  # fmt: skip
        """Those of this rank alone."""
        _check_labels(labels)
        wanted = inputs.pop("output_hidden_states", False)
        if inputs.pop("return_dict", None) is False:
            raise ValueError("return_dict: expected True, got False; the output's to_tuple() gives a tuple")
        states = self.model.base_model(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            output_hidden_states=True, return_dict=True, **inputs,
        ).hidden_states  # fmt: skip
        late = states[-1]
        output = CondenserOutput(cls=late[:, 0], last_hidden_state=late, hidden_states=states if wanted else None)
        if labels is None:
            return output
        condensed = self._condense(late, states[self.skip_from], attention_mask)
        layers = [condensed, late] if self.late_mlm else [condensed]
        losses = mlm_losses(HuggingFaceHead.of(self.model), layers, labels)
        output.head_loss = losses[0]
        output.late_loss = losses[1] if self.late_mlm else None
        output.loss = losses.sum()
        return output

    def _condense(self, late: Tensor, early: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden_states = torch.cat([late[:, :1], early[:, 1:]], dim=1)
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        for layer in self.head:
            hidden_states = layer(hidden_states, mask)
        return hidden_states

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """The model as its own ``save_pretrained`` writes it (``options`` are its), which ``AutoModel``,
        ``AutoModelForMaskedLM`` and ``SentenceTransformer`` load; beside it the head and its settings."""
        folder = Path(folder)
        self.model.save_pretrained(folder, **options)
        settings = {"n_head_layers": len(self.head), "skip_from": self.skip_from, "late_mlm": self.late_mlm}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        head = {name: value.detach().contiguous() for name, value in self.head.state_dict().items()}
        save_file(head, folder / HEAD, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls: type[Condenser],
        folder: str | Path,
        *,
        n_head_layers: int | None = None,
        skip_from: int | None = None,
        late_mlm: bool | None = None,
        **options: Any,
    ) -> Condenser:
        """A model and, where :meth:`save_pretrained` wrote one beside it, its head.

        Args:
            folder: of a masked language model, or its name on a hub.
            n_head_layers, skip_from, late_mlm: as saved, unless given; else as the class has them.
            options: of ``AutoModelForMaskedLM.from_pretrained``.

        Raises:
            FileNotFoundError: there are settings of a head but no head, or a head without settings.
            ValueError: the head that is there has another number of layers than was asked for, or other sizes.

        Warns:
            RuntimeWarning: there is no head, so that a new one was made.
        """
        given = {"n_head_layers": n_head_layers, "skip_from": skip_from, "late_mlm": late_mlm}
        settings_file, head_file = Path(folder) / SETTINGS, Path(folder) / HEAD
        saved = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.exists() else {}
        settings = saved | {name: value for name, value in given.items() if value is not None}
        if saved and not head_file.exists():
            raise FileNotFoundError(f"{head_file}: expected the head that {SETTINGS} describes; was it copied along?")
        if head_file.exists() and not saved:
            raise FileNotFoundError(
                f"{settings_file}: expected the settings of the head in {HEAD}; were they copied along?"
            )
        if saved and settings["n_head_layers"] != saved["n_head_layers"]:
            raise ValueError(
                f"n_head_layers: expected {saved['n_head_layers']}, as the head in {folder} has, got {n_head_layers}"
            )
        model = cls(AutoModelForMaskedLM.from_pretrained(folder, **options), **settings)
        if head_file.exists():
            try:
                model.head.load_state_dict(load_file(head_file))
            except RuntimeError as error:
                raise ValueError(
                    f"{head_file}: expected the {len(model.head)} layers of {SETTINGS} in the encoder's sizes: {error}"
                ) from error
        else:
            warnings.warn(
                f"{folder} has no {HEAD}: Condenser's head is new and untrained. To start from a plain encoder that is "
                "right; to go on with a pretraining, save with save_pretrained of this class",
                RuntimeWarning,
                stacklevel=2,
            )
        return model

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """In the encoder and in the head; arguments are those of the model's method."""
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable(*arguments, **options)
        self._checkpoint_head_like_the_encoder()

    def activation_checkpointing_disable(self) -> None:
        getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()
        self._checkpoint_head_like_the_encoder()

    # their names before transformers 5.24
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def _checkpoint_head_like_the_encoder(self) -> None:
        first = self.model.base_model.encoder.layer[0]
        for layer in self.head:
            layer.gradient_checkpointing = first.gradient_checkpointing
            layer._gradient_checkpointing_func = getattr(first, "_gradient_checkpointing_func", None)


class CoCondenserForPreTraining(CondenserForPreTraining):
    """Condenser with a contrastive loss of span pairs on the encoder's CLS: rows 2i and 2i + 1 of a batch are two spans
    of one text, as :class:`repdeg_fast.data.SpanPairCollator` makes them.

    Under ``torch.distributed`` the CLS vectors of all ranks, which have equally many, are compared. Gathering carries
    no gradient; the loss counts once a rank, so that gradients averaged over ranks are those of one large batch.

    Options are those of :class:`CondenserForPreTraining`.

    Example, for a batch whose activations do not fit::

        from repdeg_fast.training import cached_backward

        losses = cached_backward(model.encoded, model.contrastive_loss, batch, chunk_size=16)
        # under DistributedDataParallel
        cached_backward(
            lambda chunk: model.encoded(chunk, ddp), model.contrastive_loss, batch, chunk_size=16, module=ddp
        )
    """

    def forward(
        self,
        input_ids: Tensor | None = None,  # (2N, T)
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        contrastive: bool = True,
        **inputs: Any,
    ) -> CondenserOutput:
        """As :meth:`CondenserForPreTraining.forward`, for an even number of rows; of any number of rows without the
        contrastive loss where ``contrastive`` is ``False``: what a part of a batch can tell on its own."""
        output = self._losses(input_ids, attention_mask, token_type_ids, position_ids, labels, **inputs)
        if contrastive and output.loss is not None and output.cls is not None:
            output.contrastive_loss = self.contrastive_loss(output.cls)
            output.loss = self._weight(labels) * output.loss + output.contrastive_loss
        return output

    def encoded(self, inputs: Mapping[str, Tensor], module: nn.Module | None = None) -> Encoded:
        """A part of a batch for :func:`repdeg_fast.training.cached_backward`: its late CLS vectors, and its
        masked-language-model loss with the number of masked positions. ``module``: what wraps this model."""
        output = (self if module is None else module)(**inputs, contrastive=False)
        return Encoded(output.cls, output.loss, (inputs["labels"] != IGNORE_INDEX).sum())

    def contrastive_loss(self, cls: Tensor) -> Tensor:
        """Of the late CLS vectors (2N, d) of a whole batch of this rank."""
        if len(cls) % 2:
            raise ValueError(f"input_ids: expected an even number of rows, two spans a text, got {len(cls)}")
        ranks = _ranks.number()
        return span_pair_loss(_gathered(cls) if ranks > 1 else cls) * ranks


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Parameters that have a name already, which they have."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: other for name, other in names if name != other}


def _leave_out_tied(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """safetensors, in which Trainer saves, refuses tensors that share memory."""
    for name in _tied_names(module):
        state_dict.pop(prefix + name, None)


def _fill_in_tied(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, other in _tied_names(module).items():
        if prefix + other in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + other])


def _check_labels(labels: Tensor | None) -> None:
    if torch.compiler.is_compiling():  # a graph cannot look at values
        return
    if not isinstance(labels, Tensor) or labels.device.type != "cpu" or labels.dim() != 2:
        return
    wrong = labels[:, :1][labels[:, :1] != IGNORE_INDEX]
    if len(wrong):
        raise ValueError(
            f"labels: expected {IGNORE_INDEX} at position 0, the CLS, which is never masked; got {wrong[0].item()}"
        )


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks in their order; only the own ones carry a gradient."""
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.detach().contiguous())
    parts[torch.distributed.get_rank()] = rows
    return torch.cat(parts)
