"""The degeneration report of an embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.analysis.cosines import cosine_histogram, uniformity, uniformity_of_even
from repdeg_fast.analysis.inspection import Inspection
from repdeg_fast.analysis.neighbours import hubness
from repdeg_fast.analysis.report.charts import Bars, Lines, Scatter
from repdeg_fast.analysis.report.page import Report, Section
from repdeg_fast.analysis.spectrum import directions_for, effective_rank, isotropy, participation_ratio
from repdeg_fast.analysis.tiles import sampled

_PAIRWISE = 8192  # rows whose pairs are looked at
_DRAWN = 2000  # points in a picture
_HUB_K = 10


def embedding_numbers(
    weight: Tensor, found: Inspection, tick: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Every measure of an (N, d) embedding of which ``found`` are the cheap ones."""
    centred = found.centred_singular_values
    numbers: dict[str, Any] = {
        "rows": found.rows,
        "columns": found.columns,
        "zero_rows": found.zero_rows,
        "cosreg": found.cosreg,
        "average_cosine": found.mean_cosine,
        "mean_direction_norm": found.mean_direction_norm,
        "norm_min": float(found.norms.min()),
        "norm_median": float(found.norms.median()),
        "norm_max": float(found.norms.max()),
        "effective_rank": effective_rank(found.singular_values),
        "effective_rank_centred": effective_rank(centred),
        "participation_ratio_centred": participation_ratio(centred),
        "directions_for_90_percent": directions_for(centred, 0.9),
        "isoscore": found.isoscore,
    }
    tick("isotropy")
    numbers["isotropy"] = isotropy(weight)
    some = sampled(weight, _PAIRWISE)
    if len(some) > 1:
        tick("uniformity")
        numbers["uniformity"] = uniformity(some)
        tick("cosines of all pairs")
        counts, edges = cosine_histogram(some, bins=80)
        numbers["cosine_histogram"] = {"counts": counts.tolist(), "edges": edges.tolist()}
    if len(some) > _HUB_K:
        tick("neighbours")
        hubs = hubness(some, _HUB_K)
        numbers["hubness"] = {"skewness": hubs.skewness, "largest": hubs.largest, "orphans": hubs.orphans}
    numbers["singular_values"] = found.singular_values.tolist()
    numbers["centred_singular_values"] = centred.tolist()
    return numbers


def embedding_report(
    name: str, weight: Tensor, found: Inspection, tick: Callable[[str], None] = lambda what: None
) -> Report:
    """Sentences, pictures and numbers of an embedding that :func:`inspect_embedding` has looked at."""
    numbers = embedding_numbers(weight, found, tick)
    rows = min(found.rows, _PAIRWISE)
    return Report(
        title=f"Degeneration of {name}",
        about=f"{found.rows:,} rows of {found.columns:,} values",
        findings=findings(numbers),
        sections=_sections(weight, found, numbers),
        numbers=numbers,
        notes=[
            "Sums and spectra are of all rows, in float64, from d×d moments.",
            f"Uniformity, the histogram of cosines and hubness are of {rows:,} rows"
            + (", drawn without replacement, always the same ones." if rows < found.rows else ": all of them."),
            "Isotropy is Mu and Viswanath's, over both signs of each singular direction; effective rank is RankMe's.",
        ],
    )


def findings(numbers: dict[str, Any]) -> list[str]:
    """In sentences, with numbers."""
    rank, d = numbers["effective_rank_centred"], numbers["columns"]
    isoscore = "" if math.isnan(numbers["isoscore"]) else f"; IsoScore is {numbers['isoscore']:.3f} (1: all alike)"
    out = [
        _common_direction(numbers["average_cosine"], numbers["mean_direction_norm"]),
        f"Around their mean the rows use {rank:.0f} of {d} directions (effective rank), and"
        f" {numbers['directions_for_90_percent']} hold 90 % of the variance{isoscore}.",
        f"Isotropy of the partition function is {numbers['isotropy']:.3g} (1: the same in every direction).",
    ]
    if "uniformity" in numbers:
        even = uniformity_of_even(d)
        out.append(f"Uniformity is {numbers['uniformity']:.3f}; evenly spread directions would have about {even:.2f}.")
    if "hubness" in numbers:
        hubs = numbers["hubness"]
        out.append(
            f"Among the {_HUB_K} nearest neighbours the greatest hub is found {hubs['largest']} times, and"
            f" {100 * hubs['orphans']:.1f} % of the rows never are (skewness {hubs['skewness']:.2f}; 0: no hubs)."
        )
    out.append(
        f"Norms go from {numbers['norm_min']:.3g} to {numbers['norm_max']:.3g}, median {numbers['norm_median']:.3g};"
        f" {numbers['zero_rows']:,} rows are zero."
    )
    return out


def _common_direction(cosine: float, length: float) -> str:
    if math.isnan(cosine):
        return "There are no two rows that are not zero: nothing to compare."
    strength = "hardly any" if abs(cosine) < 0.05 else "some" if cosine < 0.2 else "a strong"
    cone = "The rows point in all directions" if strength == "hardly any" else "The rows lie in a cone"
    return (
        f"{cone}: two different rows have a cosine of {cosine:.3f} on average, and their mean direction has length"
        f" {length:.3f} (0: no common direction, 1: all rows in one). That is {strength} common direction."
    )


def _sections(weight: Tensor, found: Inspection, numbers: dict[str, Any]) -> list[Section]:
    chosen = torch.randperm(found.rows, generator=torch.Generator().manual_seed(0))[:_DRAWN]
    points = (weight[chosen].double() @ found.plane).tolist()
    cone = Scatter(
        "The cone", [x for x, _ in points], [y for _, y in points],
        values=found.norms[chosen].tolist(), value_label="norm of the row", origin=True,
    )  # fmt: skip
    energy = found.singular_values.square()
    share = 100 * float(energy[:2].sum() / energy.sum().clamp_min(1e-300))
    sections = [
        Section(
            "The cone",
            f"{len(points):,} rows in the plane of the two leading singular directions, with the origin in red; it"
            f" holds {share:.1f} % of the energy. Degenerate embeddings lie to one side.",
            [cone],
        )
    ]
    if "cosine_histogram" in numbers:
        counts, edges = numbers["cosine_histogram"]["counts"], numbers["cosine_histogram"]["edges"]
        bars = Bars("Cosines of all pairs", edges, [count / max(sum(counts), 1) for count in counts], "cosine")
        sections.append(Section("Cosines", "Isotropic rows have cosines around 0, within about 1/√d.", [bars]))
    ranks = sorted({round(found.columns ** (i / 24)) for i in range(25)})
    curves = {
        "as it is": [float(found.singular_values[i - 1].clamp_min(1e-12).log10()) for i in ranks],
        "mean row taken off": [float(found.centred_singular_values[i - 1].clamp_min(1e-12).log10()) for i in ranks],
    }
    spectrum = Lines("Singular values", [str(i) for i in ranks], curves, "log10 σ", "rank")
    sections.append(Section("Spectrum", "A steep start is a few directions that all rows share.", [spectrum]))
    scalars = [
        (key.replace("_", " "), f"{value:.6g}") for key, value in numbers.items() if not isinstance(value, (dict, list))
    ]
    return [*sections, Section("Every number", "Also in report.json.", table=[("measure", "value"), *scalars])]
