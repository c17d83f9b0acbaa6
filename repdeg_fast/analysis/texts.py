"""A model folder and a text file, for the report: what is read, in batches that a model takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeg_fast._checks import InputError
from repdeg_fast.analysis.frequency import frequency_bins
from repdeg_fast.analysis.hidden_states import HiddenStates, concatenated, stream
from repdeg_fast.analysis.layers import LayerChange, token_influence
from repdeg_fast.analysis.report.model import BINS, Measured, Tick

_LEAST = 10  # tokens of a text: with fewer no measure says anything


def load_model(folder: Path) -> tuple[torch.nn.Module, Any]:
    """A Hugging Face model and its tokenizer from a folder, nothing from the network."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as missing:
        raise InputError("analyze needs transformers: pip install 'repdeg-fast[hf]'") from missing
    if not (folder / "config.json").exists():
        raise InputError(
            f"model: {folder} has no config.json; expected the folder of a Hugging Face model, as save_pretrained or"
            f" `hf download NAME --local-dir DIR` makes it (nothing is downloaded here)"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of a head that is left out, and of the pooler that a head replaces
    try:
        model, found = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model: {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
    if random := [name for name in found["missing_keys"] if "pooler" not in name]:
        raise InputError(f"model: {folder} has no weights for {random[0]}; they would be random")
    return model, tokenizer


def check_length(length: int, model: Any, tokenizer: Any) -> None:
    """Raises InputError for passages that are longer than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or length
    most = min(positions, tokenizer.model_max_length)
    if length > most:
        raise InputError(f"length: the model takes {most} tokens at most, got {length}")


class Text:
    """The lines of a file as sequences of ids, shortest first so that batches have little padding; up to so many
    tokens."""

    def __init__(self, path: Path, tokenizer: Any, tokens: int, length: int, batch: int):
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text: cannot read {path}: {error}") from error
        self.ids: list[list[int]] = []
        count = 0
        for line in lines:
            if count >= tokens:
                break
            ids = tokenizer(line, truncation=True, max_length=length)["input_ids"]
            self.ids.append(ids)
            count += len(ids)
        if not count:
            raise InputError(f"text: {path} has no text; expected lines of it")
        self.tokens, self.batch, self.pad = count, batch, tokenizer.pad_token_id or 0
        self.ids.sort(key=len)
        every = torch.tensor([token for ids in self.ids for token in ids])
        self.counts = every.bincount(minlength=len(tokenizer))
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
        self.counts[self.special[self.special < len(self.counts)]] = 0
        found = int(self.counts.sum())
        if not found:
            raise InputError(
                f"text: {path} has special tokens only; expected words that the tokenizer knows, and its files beside"
                " the model"
            )
        if found < _LEAST:
            raise InputError(f"text: {path} has {found} tokens that are not special; expected at least {_LEAST}")

    def batches(self, most: int | None = None) -> Iterator[dict[str, Tensor]]:
        ids = self.ids if most is None or len(self.ids) <= most else self.ids[:: len(self.ids) // most]
        for start in range(0, len(ids), self.batch):
            rows = ids[start : start + self.batch]
            width = max(map(len, rows))
            padded = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            yield {"input_ids": padded, "attention_mask": mask}


def measure(name: str, model: torch.nn.Module, text: Text, points: int, tick: Tick) -> Measured:
    """One pass over the text for covariances and a sample of tokens, and one over some sentences for influence."""
    bins = frequency_bins(text.counts, len(BINS))
    change, parts, seen = LayerChange(bins), list[HiddenStates](), 0
    wanted = torch.zeros(text.tokens, dtype=torch.bool)
    wanted[torch.randperm(text.tokens, generator=torch.Generator().manual_seed(0))[:points]] = True
    for hidden in stream(model, text.batches()):
        tick(f"{name}: hidden states")
        change.update(hidden)
        chosen = wanted[seen : seen + len(hidden)] & (bins[hidden.tokens] >= 0)
        parts.append(hidden.select(chosen))
        seen += len(hidden)
    influence = {}
    if any(len(ids) > 3 for ids in text.ids):
        tick(f"{name}: influence")
        influence = token_influence(model, text.batches(most=600), bins)
    return Measured(name, concatenated(parts), change, influence, text.tokens, text.counts)
