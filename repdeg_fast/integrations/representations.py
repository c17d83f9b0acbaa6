"""Representations in the logs of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repdeg_fast.analysis.metrics import representation_metrics

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise ImportError("repdeg_fast.integrations.representations needs it: pip install 'repdeg-fast[hf]'") from missing


class RepresentationCallback(TrainerCallback):
    """Logs, every so many steps, how degenerate the input embedding is: average cosine, effective rank, IsoScore.

    Example::

        trainer = Trainer(model, …)
        trainer.add_callback(RepresentationCallback(trainer, every=100))

    The numbers go through ``trainer.log``, and so to W&B, TensorBoard and ``trainer.state.log_history``.

    At BERT-base, on one core of an AMD EPYC, they take 0.30 s of processor time and a step of 256 tokens 2.2 s: 0.14 %
    with ``every=100``.

    Args:
        trainer: The one it is added to.
        every: Steps.
        counts: (V,), how often each token occurs: adds rare against frequent tokens.
        prefix: Before each metric's name.
    """

    def __init__(self, trainer: Any, every: int = 100, counts: Tensor | None = None, prefix: str = "embedding/"):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a positive number of steps, got {every!r}")
        if not callable(getattr(trainer, "log", None)):
            raise TypeError(f"trainer: expected the Trainer that it is added to, got {type(trainer).__name__}")
        self.trainer, self.every, self.counts, self.prefix = trainer, every, counts, prefix

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            self.trainer.log(self.measure(kwargs["model"]))

    def measure(self, model: Any) -> dict[str, float]:
        """Of the model's input embedding as it is now. Of NaN and Inf in it the number is logged, and nothing else: a
        callback does not end a run."""
        weight = model.get_input_embeddings().weight
        if not torch.isfinite(weight).all():
            return {f"{self.prefix}not_finite": float((~torch.isfinite(weight)).sum())}
        return {f"{self.prefix}{name}": value for name, value in representation_metrics(weight, self.counts).items()}
