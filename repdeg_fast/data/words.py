"""Where words begin, by the marks that tokenizers put into their vocabularies."""

from __future__ import annotations

from typing import Any

# mark → whether a token that begins with it begins a word, else goes on with one; of WordPiece, byte-level BPE and
# SentencePiece
_MARKS = {"##": False, "\u0120": True, "\u2581": True}


def continuation_token_ids(tokenizer: Any) -> list[int]:
    """The tokens of a transformers tokenizer that go on with the word before them. Special tokens are none of them; a
    token after one begins a word, whatever it is.

    Raises:
        ValueError: no token has a mark of WordPiece ("##"), byte-level BPE ("Ġ") or SentencePiece ("▁").
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    for mark, begins in _MARKS.items():
        marked = {index for token, index in vocabulary.items() if token.startswith(mark)}
        if marked:
            continuations = set(vocabulary.values()) - marked if begins else marked
            return sorted(continuations - special)
    raise ValueError(
        "whole_words: expected a tokenizer that marks where words begin or go on ('##' in WordPiece, 'Ġ' in byte-level "
        f"BPE, '▁' in SentencePiece), got {type(tokenizer).__name__} without such tokens"
    )
