"""Batches for Condenser and coCondenser (arXiv 2104.08253, 2108.05540): spans of text with whole words masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from repdeg_fast._checks import check_finite, check_size
from repdeg_fast.data._random import Draws
from repdeg_fast.data.masking import IGNORE_INDEX, integers
from repdeg_fast.data.words import continuation_token_ids

Span = Sequence[int] | Tensor  # token ids without special tokens


class _Collator(Draws):
    """What the two collators share: rows from spans."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int = 512,
        probability: float = 0.15,
        generator: torch.Generator | None = None,
    ) -> None:
        check_finite("probability", probability)
        if not 0 < probability <= 1:
            raise ValueError(f"probability: expected a number above 0 and at most 1, got {probability}")
        super().__init__(generator)
        for name in ("mask_token_id", "pad_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(f"tokenizer: expected one with a {name}, got {type(tokenizer).__name__} without")
        self.tokenizer, self.probability = tokenizer, probability
        self._before, self._after = _special_tokens_around(tokenizer)
        check_size("max_length", max_length)
        self._most = max_length - len(self._before) - len(self._after)
        if self._most < 1:
            raise ValueError(f"max_length: expected room for a token beside the special ones, got {max_length}")
        self._continuations = torch.tensor(continuation_token_ids(tokenizer), dtype=torch.int64)
        self._vocabulary = len(tokenizer)

    def _batch(self, spans: list[Tensor]) -> dict[str, Tensor]:
        before = self._before
        if len(before) and any(torch.equal(span[: len(before)], before) for span in spans):
            raise ValueError(
                f"examples: expected spans without special tokens, got one that begins with {before.tolist()} as the "
                "tokenizer begins a text; give it add_special_tokens=False"
            )
        rows = [self._row(self._cut(span)) for span in spans]
        inputs, labels = zip(*rows, strict=True)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": pad_sequence(list(inputs), batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORE_INDEX),
        }

    def _cut(self, span: Tensor) -> Tensor:
        surplus = len(span) - self._most
        first = self._random_integer(surplus + 1) if surplus > 0 else 0
        return span[first : first + self._most]

    def _row(self, span: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels, with special tokens around them."""
        chosen = self._choose(span)
        labels = span.masked_fill(~chosen, IGNORE_INDEX)
        fate = torch.rand(len(span), generator=self._numbers)
        random = torch.randint(self._vocabulary, span.shape, generator=self._numbers)
        inputs = torch.where(chosen & (fate < 0.9), random, span)  # a tenth of the chosen, once masks are laid over it
        inputs = inputs.masked_fill(chosen & (fate < 0.8), self.tokenizer.mask_token_id)
        around = (self._before, self._after)
        ignored = [torch.full_like(ids, IGNORE_INDEX) for ids in around]
        return torch.cat([around[0], inputs, around[1]]), torch.cat([ignored[0], labels, ignored[1]])

    def _choose(self, span: Tensor) -> Tensor:
        """Which tokens to predict."""
        begins = ~torch.isin(span, self._continuations)
        begins[0] = True
        first = [*begins.nonzero().flatten().tolist(), len(span)]
        wanted = max(1, round(self.probability * len(span)))
        chosen = torch.zeros(len(span), dtype=torch.bool)
        for word in torch.randperm(len(first) - 1, generator=self._numbers).tolist():
            start, stop = first[word], first[word + 1]
            if stop - start <= wanted:
                chosen[start:stop] = True
                wanted -= stop - start
            if wanted == 0:
                break
        return chosen

    def _random_integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._numbers))


class SpanCollator(_Collator):
    """A span a row: cut to length, words masked whole, special tokens put around it, padded.

    Of a span of n tokens max(1, round(probability·n)) are chosen, as far as words in random order fill that number (a
    word that would exceed it is passed over). Of the chosen, 80 % become the mask token, 10 % a random token, and 10 %
    stay; labels are the tokens they were, −100 elsewhere. A span that is too long is cut at a random place, before its
    words are chosen.

    Example::

        collator = SpanCollator(tokenizer, max_length=128)
        loader = DataLoader(spans, batch_size=32, collate_fn=collator)

    Args:
        tokenizer: of transformers. Word boundaries are known for WordPiece, byte-level BPE (RoBERTa) and SentencePiece.
        max_length: T at most, special tokens included.
        probability: of the tokens, to be chosen.
        generator: of random numbers, on the CPU; torch's own unless given, and in the workers of a ``DataLoader``,
            which its own ``generator`` seeds.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any] | Span]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, (B, T) each, T the longest row's length.

        Args:
            examples: spans, or mappings with one under ``"text"``.

        Raises:
            TypeError, ValueError: saying which example, what was given and expected.
        """
        spans = [_under("text", example, i) for i, example in enumerate(_some(examples))]
        return self._batch([_tokens(span, f"examples[{i}]") for i, span in enumerate(spans)])


class SpanPairCollator(_Collator):
    """Two different spans of each document, in rows 2i and 2i + 1: coCondenser's batches, 2N rows for N documents.

    Options are those of :class:`SpanCollator`.

    Example::

        documents = [{"spans": [tokenizer(s, add_special_tokens=False).input_ids for s in text]} for text in texts]
        loader = DataLoader(documents, batch_size=64, collate_fn=SpanPairCollator(tokenizer, max_length=128))
    """

    def __call__(self, examples: Sequence[Mapping[str, Any] | Sequence[Span]]) -> dict[str, Tensor]:
        """As :class:`SpanCollator`; ``examples`` are documents: sequences of at least two spans, or mappings with one
        under ``"spans"``."""
        pairs = []
        for i, document in enumerate(_some(examples)):
            spans = _under("spans", document, i)
            if len(spans) < 2:
                raise ValueError(
                    f"examples[{i}]: expected a document of at least two spans, got {len(spans)}; leave such out"
                )
            first, second = torch.randperm(len(spans), generator=self._numbers)[:2].tolist()
            pairs += [_tokens(spans[j], f"examples[{i}], span {j}") for j in (first, second)]
        return self._batch(pairs)


def _special_tokens_around(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before and behind a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    inside = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
    if not inside:
        raise ValueError(f"tokenizer: expected one that knows the letter a, got {type(tokenizer).__name__}")
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return ids[: inside[0]], ids[inside[-1] + 1 :]


def _some(examples: Any) -> Any:
    if isinstance(examples, (Mapping, str)) or not isinstance(examples, Sequence):
        raise TypeError(f"examples: expected a sequence of examples, got {type(examples).__name__}")
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    return examples


def _under(name: str, example: Any, number: int) -> Any:
    """What a mapping has under ``name``; anything else as it is."""
    if not isinstance(example, Mapping):
        return example
    if name not in example:
        raise ValueError(f"examples[{number}]: expected a mapping with {name!r}, got one with {', '.join(example)}")
    return example[name]


def _tokens(span: Any, what: str) -> Tensor:
    """(n,) int64, n at least 1."""
    tokens = integers(span, what, "token ids, a sequence of integers")
    if not len(tokens):
        raise ValueError(f"{what}: expected at least one token, got none")
    return tokens
