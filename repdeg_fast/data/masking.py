"""Batches for masked-language-model pretraining."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from repdeg_fast._checks import check_finite, check_flag
from repdeg_fast.data._random import Draws
from repdeg_fast.data.words import continuation_token_ids

IGNORE_INDEX = -100


class MaskingCollator(Draws):
    """Pads examples to a batch and masks each of its words with probability ``probability``.

    A masked token becomes ``mask_token_id`` and its label the token it was; all other labels are −100. Special tokens
    and padding are never masked. (BERT leaves a tenth of the chosen tokens as they are and exchanges a tenth for
    random ones, so that inputs without masks are no surprise later; AMOS's discriminator never sees a mask.)

    Example::

        collator = MaskingCollator.from_tokenizer(tokenizer, whole_words=True)
        loader = DataLoader(dataset, batch_size=32, collate_fn=collator)

    Args:
        mask_token_id, pad_token_id: as the vocabulary has them.
        special_token_ids: tokens that are never masked.
        continuation_token_ids: tokens that go on with the word before them ("##" in WordPiece;
            :func:`repdeg_fast.data.words.continuation_token_ids` finds them). Where they are given,
            words are masked whole: all tokens of a word or none, again a fraction ``probability`` of all tokens on
            average.
        probability: 0.15 in BERT, ELECTRA and AMOS.
        generator: of random numbers, on the CPU, whose state can be saved and restored; torch's own unless given,
            and in the workers of a ``DataLoader``, which its own ``generator`` seeds.
    """

    def __init__(
        self,
        *,
        mask_token_id: int,
        pad_token_id: int,
        special_token_ids: Iterable[int],
        continuation_token_ids: Iterable[int] | None = None,
        probability: float = 0.15,
        generator: torch.Generator | None = None,
    ) -> None:
        check_finite("probability", probability)
        if not 0 <= probability <= 1:
            raise ValueError(f"probability: expected a number from 0 to 1, got {probability}")
        super().__init__(generator)
        self.mask_token_id, pad = _token_id("mask_token_id", mask_token_id), _token_id("pad_token_id", pad_token_id)
        self.padding = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
        special = _token_ids("special_token_ids", special_token_ids)
        self.special_token_ids = torch.tensor(sorted({*special, self.mask_token_id, pad}))
        continuations = () if continuation_token_ids is None else continuation_token_ids
        continuations = sorted(_token_ids("continuation_token_ids", continuations))
        self.continuation_token_ids = torch.tensor(continuations, dtype=torch.int64)
        self.probability = probability

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, whole_words: bool = False, **options: Any) -> MaskingCollator:
        """For a tokenizer of transformers; ``options`` are ``probability`` and ``generator``.

        Raises:
            ValueError: it has no mask or padding token, or, for ``whole_words``, no marks of words.
        """
        check_flag("whole_words", whole_words)
        for name in ("mask_token_id", "pad_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(f"tokenizer: expected one with a {name}, got {type(tokenizer).__name__} without")
        continuations = continuation_token_ids(tokenizer) if whole_words else None
        return cls(
            mask_token_id=tokenizer.mask_token_id,
            pad_token_id=tokenizer.pad_token_id,
            special_token_ids=tokenizer.all_special_ids,
            continuation_token_ids=continuations,
            **options,
        )

    def __call__(self, examples: Sequence[Mapping[str, Any] | Sequence[int] | Tensor]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (B, T) with T the longest example's length.

        Args:
            examples: token ids, or mappings with ``input_ids`` and possibly ``attention_mask`` and ``token_type_ids``
                (which is then in the batch too).

        Raises:
            TypeError, ValueError: saying which example, what was given and expected.
        """
        if isinstance(examples, Mapping):
            raise TypeError("examples: expected a sequence of examples, got one mapping; pass its rows one by one")
        if not isinstance(examples, Collection):
            raise TypeError(f"examples: expected a sequence of examples, got {type(examples).__name__}")
        if isinstance(examples, Tensor) and examples.dim() != 2:
            raise ValueError(f"examples: expected a tensor of shape (B, T), got {tuple(examples.shape)}")
        if not len(examples):
            raise ValueError("examples: expected at least one, got none")
        rows = [{**example} if isinstance(example, Mapping) else {"input_ids": example} for example in examples]
        given = {"input_ids", "attention_mask"}.union(*rows)
        names = [name for name in self.padding if name in given]
        tensors = [_tensors(row, names, f"examples[{number}]") for number, row in enumerate(rows)]
        batch = {
            name: pad_sequence([row[name] for row in tensors], batch_first=True, padding_value=self.padding[name])
            for name in names
        }
        tokens = batch["input_ids"]
        masked = self._choose(tokens, batch["attention_mask"])
        batch["labels"] = tokens.masked_fill(~masked, IGNORE_INDEX)
        batch["input_ids"] = tokens.masked_fill(masked, self.mask_token_id)
        return batch

    def _choose(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Every token looks at the random number of its word's first token."""
        special = torch.isin(tokens, self.special_token_ids)
        starts = ~torch.isin(tokens, self.continuation_token_ids)
        starts[:, 1:] |= special[:, :-1]
        starts[:, :1] = True
        first = (torch.arange(tokens.shape[1]) * starts).cummax(dim=1).values
        numbers = torch.rand(tokens.shape, generator=self._numbers).gather(1, first)
        return (numbers < self.probability) & ~special & attention_mask.bool()


def _token_ids(name: str, values: Iterable[int]) -> list[int]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected token ids, got {type(values).__name__}")
    return [_token_id(f"{name}[{place}]", value) for place, value in enumerate(values)]


def _token_id(name: str, value: int) -> int:
    """Of Python, of NumPy or of a tensor."""
    try:
        index = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        index = None
    if index is None:
        raise TypeError(f"{name}: expected a token id, an integer of at least 0, got {value!r:.60}")
    if not 0 <= index < 2**63:
        raise ValueError(f"{name}: expected a token id, an integer of at least 0, got {index}")
    return index


def _tensors(row: dict[str, Any], names: Sequence[str], what: str) -> dict[str, Tensor]:
    """An example's ``names``, each (T,) int64; without an attention mask, all tokens count."""
    if any(name not in row for name in names if name != "attention_mask"):
        expected = "input_ids, and token_type_ids in all examples or in none"
        raise ValueError(f"{what}: expected {expected}, got {', '.join(row)}")
    result = {name: integers(row[name], f"{what}: {name}") for name in names if name in row}
    length = len(result["input_ids"])
    result.setdefault("attention_mask", torch.ones(length, dtype=torch.int64))
    for name, values in result.items():
        if len(values) != length:
            raise ValueError(f"{what}: {name}: expected {length} values like input_ids, got {len(values)}")
    return result


def integers(values: Any, what: str, expected: str = "a sequence of integers") -> Tensor:
    """(n,) int64."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):  # strings, say
        tensor = None
    if tensor is None or tensor.dim() != 1 or (tensor.is_floating_point() and len(tensor)):
        raise TypeError(f"{what}: expected {expected}, got {values!r:.60}")
    return tensor.long()
