"""Real translation pairs from the gettext catalogues of this machine or from a file, their subwords and batches."""

from __future__ import annotations

import ast
import csv
import re
import struct
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

Pair = tuple[str, str]
PAD, BEGIN, END, UNKNOWN = range(4)
FEWEST_PAIRS = 2_000


def load_pairs(language: str, file: Path | None = None) -> list[Pair]:
    """(English, translation), each English text once, in an order that does not depend on the machine's folders."""
    if file:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)  # a quotation mark is text, not CSV's
            found = [(row[0], row[1]) for row in rows if len(row) >= 2]
        origin = str(file)
    else:
        catalogues = find_catalogues(language)
        found = [pair for path in catalogues for pair in read_catalogue(path)]
        origin = f"{len(catalogues)} gettext catalogues"
    pairs: dict[str, str] = {}
    for source, target in sorted(set(found)):
        source, target = _plain(source), _plain(target)
        if source != target and len(source.split()) >= 2 and target:
            pairs.setdefault(source, target)
    print(f"{len(pairs):,} pairs of English of two words or more and its translation ({language}) from {origin}")
    if len(pairs) < FEWEST_PAIRS:
        sys.exit(
            f"That is too few: at least {FEWEST_PAIRS:,} are needed. Catalogues come with programs; slim images leave "
            "them out. For more, `pip install django sphinx`, or install desktop programs with the system's package "
            "manager; or name another --language; or give pairs of your own: --pairs FILE.tsv"
        )
    return list(pairs.items())


def find_catalogues(language: str) -> list[Path]:
    """Every .mo file of the language under /usr/share and in Python's packages, and .po files that have no .mo."""
    roots = {"/usr/share", "/usr/local/share", f"{sys.prefix}/share", sysconfig.get_path("purelib"), *sys.path[1:]}
    found = {
        path.resolve()
        for root in roots
        if Path(root).is_dir()
        for ending in ("mo", "po")
        for path in Path(root).glob(f"**/{language}/LC_MESSAGES/*.{ending}")
    }
    return sorted(path for path in found if path.suffix == ".mo" or path.with_suffix(".mo") not in found)


def read_catalogue(path: Path) -> list[Pair]:
    """The texts of a catalogue in pairs; of those with a plural, the singular. None where it cannot be read."""
    try:
        entries = _read_mo(path.read_bytes()) if path.suffix == ".mo" else _read_po(path.read_text("utf-8"))
    except (OSError, ValueError, LookupError, SyntaxError, struct.error):
        return []
    return [(source.rpartition("\4")[2], target) for source, target in entries if source and target]


def _read_mo(data: bytes) -> list[Pair]:
    """https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html"""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}[data[:4]]
    count, *tables = struct.unpack(f"{order}3I", data[8:20])

    def text(table: int, index: int) -> bytes:
        length, start = struct.unpack_from(f"{order}2I", data, table + 8 * index)
        return data[start : start + length].split(b"\0")[0]

    entries = [(text(tables[0], index), text(tables[1], index)) for index in range(count)]
    header = next((target.decode("ascii", "ignore") for source, target in entries if not source), "")
    charset = re.search(r"charset=(\S+)", header)
    encoding = charset[1] if charset else "utf-8"
    return [(source.decode(encoding), target.decode(encoding)) for source, target in entries]


def _read_po(text: str) -> list[Pair]:
    strings = r'((?:"(?:[^"\\]|\\.)*"\s*)+)'
    entry = re.compile(rf"^msgid {strings}(?:msgid_plural {strings})?msgstr(?:\[0\])? {strings}", re.MULTILINE)
    return [(ast.literal_eval(f"({m[1]})"), ast.literal_eval(f"({m[3]})")) for m in entry.finditer(text)]


def _plain(text: str) -> str:
    """One line, without the marks of keyboard shortcuts (``_File``, ``&File``) and control characters."""
    return " ".join(re.sub(r"(?<!\w)[_&](?=\w)|[\x00-\x08\x0e-\x1f]", "", text).split())


class Subwords:
    """A vocabulary of frequent pieces of words, shared by both languages; a text is cut into the longest that fit.

    A piece that begins a word begins with a space, so that joining the pieces gives the text back.
    """

    longest = 12

    def __init__(self, texts: list[str], size: int) -> None:
        words = Counter(word for text in texts for word in _words(text))
        pieces: Counter[str] = Counter()
        for word, count in words.items():
            for start in range(len(word)):
                for end in range(start + 2, min(len(word), start + self.longest) + 1):
                    pieces[word[start:end]] += count
        letters = sorted({letter for word, count in words.items() for letter in word if count > 1})
        worth = sorted(pieces, key=lambda piece: (-pieces[piece] * (len(piece) - 1), piece))
        self.pieces = ["", "", "", "\ufffd", *letters, *worth[: max(0, size - 4 - len(letters))]]
        self.index = {piece: index for index, piece in enumerate(self.pieces) if piece}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return [index for word in _words(text) for index in self._cut(word)]

    def decode(self, indices: list[int]) -> str:
        return "".join(self.pieces[index] for index in indices).strip()

    def _cut(self, word: str) -> Iterator[int]:
        while word:
            piece = next((word[:end] for end in range(self.longest, 0, -1) if word[:end] in self.index), None)
            yield self.index[piece] if piece else UNKNOWN
            word = word[len(piece) if piece else 1 :]


def _words(text: str) -> list[str]:
    return re.findall(r" ?\w+| ?[^\w ]", " " + text)


def batches(pairs: list[tuple[list[int], list[int]]], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless padded batches (B, S) and (B, T), the latter with BEGIN and END, of pairs of like length."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order) - size, 32 * size):
            near = sorted(order[start : start + 32 * size], key=lambda place: len(pairs[place][1]))
            groups = [near[first : first + size] for first in range(0, len(near), size)]
            for group in torch.randperm(len(groups), generator=generator).tolist():
                yield collate([pairs[place] for place in groups[group]])


def collate(pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    targets = [[BEGIN, *target, END] for _, target in pairs]
    return _padded([source for source, _ in pairs]), _padded(targets)


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
