"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The word at (row, column) of a stream is lane column % 4 of Philox with key = seed (its low and high 32 bits) and
counter = (column // 4, row, stream, 0). Every backend makes these same 32 bits, so noise is never stored and any block
of it can be made without the rest. From a word x:

    u = ((x >> 9) + ½) · 2⁻²³        exact in fp32, never 0 or 1
    Gumbel noise g = −log(−log u)
    dropout keeps where u ≥ p, with p rounded to fp32
"""

from __future__ import annotations

import torch
from torch import Tensor

# A seed may serve two operations at once: each draws from a stream of its own.
GUMBEL_STREAM = 0
DROPOUT_STREAM = 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """The four output words, int64 in [0, 2³²), of four counter and two key words; tensors broadcast."""
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2⁶⁴, so the masks recover both halves of the unsigned product
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & _LOW) ^ c1 ^ k0, second & _LOW
        c2, c3 = (first >> 32 & _LOW) ^ c3 ^ k1, first & _LOW
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1, c2, c3


def words(seed: Tensor, rows: range, columns: range, stream: int) -> Tensor:
    """(len(rows), len(columns)) words, int64 in [0, 2³²), on the device of ``seed``, a one-element int64 tensor."""
    if not rows or not columns:
        return seed.new_empty(len(rows), len(columns))
    key = (seed.reshape(()) & _LOW, seed.reshape(()) >> 32 & _LOW)
    first = columns.start // 4
    quads = torch.arange(first, (columns.stop + 3) // 4, device=seed.device)
    row = torch.arange(rows.start, rows.stop, device=seed.device)[:, None]
    lanes = torch.stack(philox((quads, row, torch.full_like(row, stream), torch.zeros_like(row)), key), dim=-1)
    return lanes.flatten(1)[:, columns.start - 4 * first : columns.stop - 4 * first]


def uniform(seed: Tensor, rows: range, columns: range, stream: int) -> Tensor:
    """(len(rows), len(columns)) numbers in (0, 1), fp32."""
    return ((words(seed, rows, columns, stream) >> 9).float() + 0.5) * 2.0**-23


def gumbel(
    seed: Tensor, rows: range, columns: range, stream: int = GUMBEL_STREAM, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(len(rows), len(columns)) standard Gumbel noise; the logarithms are taken in ``dtype``."""
    return -(-uniform(seed, rows, columns, stream).to(dtype).log()).log()


def dropout_mask(seed: Tensor, rows: range, columns: range, p: float, stream: int = DROPOUT_STREAM) -> Tensor:
    """(len(rows), len(columns)) bool, true with probability 1 − p: what dropout keeps."""
    return uniform(seed, rows, columns, stream) >= p
