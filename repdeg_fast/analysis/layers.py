"""How representations change from layer to layer, and how far tokens reach (1909.01380, section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from repdeg_fast import _ranks
from repdeg_fast.analysis.cca import CanonicalCorrelations, pwcca
from repdeg_fast.analysis.covariances import Covariances
from repdeg_fast.analysis.hidden_states import HiddenStates, reader

_LEAST = 3  # points for which a distance is given at all


class LayerChange:
    """PWCCA distance of consecutive layers, over all tokens and by bins of tokens; from a stream.

    Args:
        bins: (V,), the bin of each token id, −1 for none, as :func:`~repdeg_fast.analysis.frequency_bins` gives; or
        None.
    """

    def __init__(self, bins: Tensor | None = None):
        self.bins = bins
        self._parts: dict[int, Covariances] = {}

    def update(self, hidden: HiddenStates) -> LayerChange:
        bins = torch.zeros_like(hidden.tokens) if self.bins is None else bins_of(hidden.tokens, self.bins)
        for part in bins.unique().tolist():
            covariances = self._parts.setdefault(part, Covariances(hidden.layers, band=1))
            covariances.update(*hidden.select(bins == part).states)
        return self

    def merge_ranks(self, group: Any = None) -> LayerChange:
        """On all ranks of ``torch.distributed`` at once: adds the tokens of the others. Returns itself."""
        told: list[Any] = [[*self._parts]]
        if (ranks := _ranks.number(group)) > 1:
            told = [None] * ranks
            distributed.all_gather_object(told, [*self._parts], group=group)
        for part in sorted({part for parts in told for part in parts}):
            self._parts.setdefault(part, Covariances(band=1)).merge_ranks(group)
        return self

    def whole(self) -> Covariances:
        """Of all tokens, of whatever bin: sides are layers, of which consecutive pairs are kept."""
        out = Covariances()
        for part in self._parts.values():
            out.merge(part)
        if not out.points:
            raise ValueError("hidden: expected some tokens, got none")
        return out

    def overall(self) -> list[CanonicalCorrelations]:
        """Entry i: from layer i to i + 1."""
        return _changes(self.whole())

    def by_bin(self) -> dict[int, list[CanonicalCorrelations]]:
        """For each bin with tokens; few of them give many correlations of 1 (``forced``), and those with fewer than 3
        points are left out."""
        parts = sorted(self._parts.items())
        return {part: _changes(found) for part, found in parts if part >= 0 and found.points >= _LEAST}


def bins_of(tokens: Tensor, bins: Tensor) -> Tensor:
    """The bin of each of the tokens (any shape)."""
    if not isinstance(bins, Tensor) or bins.is_floating_point() or bins.dim() != 1:
        got = f"{bins.dtype} {tuple(bins.shape)}" if isinstance(bins, Tensor) else type(bins).__name__
        raise ValueError(f"bins: expected a vector (V,) of integers, the bin of each token id, got {got}")
    if len(tokens) and int(tokens.max()) >= len(bins):
        raise ValueError(f"bins: expected one a token id, got {len(bins)} and a token {int(tokens.max())}")
    return bins[tokens]


def layer_change(hidden: HiddenStates | Iterable[HiddenStates], bins: Tensor | None = None) -> LayerChange:
    """:class:`LayerChange` of collected hidden states, or of a stream of them."""
    change = LayerChange(bins)
    for part in [hidden] if isinstance(hidden, HiddenStates) else hidden:
        change.update(part)
    return change


def _changes(covariances: Covariances) -> list[CanonicalCorrelations]:
    return [pwcca(covariances.of(i, i + 1)) for i in range(len(covariances) - 1)]


def token_influence(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], bins: Tensor, *, seed: int = 0
) -> dict[int, list[CanonicalCorrelations]]:
    """How much tokens of a bin matter to the others: one token of each sentence, drawn at random, is hidden from
    attention, and the other tokens' representations are compared with those in the whole sentence, by PWCCA in every
    layer. (The paper hides it in the last of these layers alone, which needs the model's inside; here it is hidden in
    all, so that influence adds up from layer to layer. In the first layer both are the same.)

    Args:
        batches: Dicts with ``input_ids`` and ``attention_mask`` (B, L). Positions stay as they are.
        bins: (V,), the bin of each token id, −1 for tokens that are never left out (special ones, say).

    Returns:
        For each bin of which tokens were left out, an entry a layer after the embeddings: ``.distance`` is the
        influence.

    Raises:
        TypeError: batches that are no dicts with an ``attention_mask``.
        ValueError: as :func:`~repdeg_fast.analysis.collect`; no token could be left out.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[int, list[Covariances]] = {}
    with reader(model) as read:
        for batch in batches:
            if not isinstance(batch, Mapping) or "attention_mask" not in batch:
                raise TypeError("batches: token_influence needs dicts with input_ids and attention_mask")
            ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()
            allowed = mask & (bins_of(ids, bins) >= 0) & (mask.sum(1, keepdim=True) > 1)
            rows = allowed.any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            left_out = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1).argmax(1)[rows]
            whole = {name: value[rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
            without = mask[rows].scatter(1, left_out[:, None], False)
            names, before, _, _ = read(whole)
            after = read({**whole, "attention_mask": without.to(batch["attention_mask"].dtype)})[1]
            part_of = bins[ids[rows].gather(1, left_out[:, None])[:, 0]]
            for part in part_of.unique().tolist():
                others = without & (part_of == part)[:, None]
                found = parts.setdefault(part, [Covariances([name, f"{name} without"]) for name in names[1:]])
                for covariances, x, y in zip(found, before[1:], after[1:], strict=True):
                    covariances.update(x.cpu()[others], y.cpu()[others])
    if not parts:
        raise ValueError("batches: no sentence has a token of a bin that could be left out, and another one")
    return {
        part: [pwcca(layer) for layer in found] for part, found in sorted(parts.items()) if found[0].points >= _LEAST
    }
