"""The bottom-up report of a model: what happens to representations from layer to layer (1909.01380)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from repdeg_fast.analysis.cka import cka_matrix
from repdeg_fast.analysis.cosines import average_cosine
from repdeg_fast.analysis.covariances import Covariances
from repdeg_fast.analysis.hidden_states import HiddenStates
from repdeg_fast.analysis.layers import LayerChange
from repdeg_fast.analysis.mutual_information import mutual_information
from repdeg_fast.analysis.neighbours import position_distance, position_distance_by_chance, token_identity
from repdeg_fast.analysis.report.charts import Chart, Heatmap, Lines, Scatter
from repdeg_fast.analysis.report.page import Report, Section
from repdeg_fast.analysis.spectrum import effective_rank, isoscore

BINS = ("rare", "middle", "frequent")
_PICTURED = 6  # kinds of tokens with a colour
_TSNE = 1000  # points

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one pass over a text gave."""

    name: str
    sample: HiddenStates  # of tokens in their order, special ones left out
    change: LayerChange
    influence: dict[int, list[Any]]
    tokens: int  # that were read
    counts: Tensor  # (V,)


def curves_of(measured: Measured, clusters: int, k: int, tick: Tick) -> dict[str, Any]:
    """Every number by layer."""
    sample, out = measured.sample, dict[str, Any]()
    k = min(k, len(sample) - 1)
    rows: dict[str, list[float]] = {}
    for name, state in zip(sample.layers, sample.states, strict=True):
        tick(f"{measured.name}, {name}")
        found = mutual_information(state, sample.tokens, clusters)
        own = Covariances([name]).update(state)
        for key, value in {
            "mutual_information": found.corrected,
            "mutual_information_plug_in": found.plug_in,
            "token_identity": token_identity(state, sample.tokens, k),
            "position_distance": position_distance(state, sample.positions, k=k),
            "average_cosine": average_cosine(state),
            "effective_rank": effective_rank(own, centred=True),
            "isoscore": isoscore(own),
        }.items():
            rows.setdefault(key, []).append(value)
    out |= rows
    out["token_entropy"] = found.entropy
    out["position_distance_by_chance"] = position_distance_by_chance(sample.positions, k=k)
    out["layers"], out["k"], out["clusters"] = list(sample.layers), k, found.clusters
    overall = measured.change.overall()
    out["layer_change"] = [one.distance for one in overall]
    by_bin = measured.change.by_bin()
    out["layer_change_by_frequency"] = {BINS[part]: [one.distance for one in found] for part, found in by_bin.items()}
    out["layer_change_forced"] = {BINS[part]: [one.forced for one in found] for part, found in by_bin.items()}
    out["layer_change_forced"]["all"] = [one.forced for one in overall]
    out["layer_change_points"] = {BINS[part]: found[0].points for part, found in by_bin.items()}
    out["token_influence"] = {BINS[part]: [one.distance for one in found] for part, found in measured.influence.items()}
    out["token_influence_forced"] = {
        BINS[part]: [one.forced for one in found] for part, found in measured.influence.items()
    }
    out["token_influence_points"] = {BINS[part]: found[0].points for part, found in measured.influence.items()}
    tick(f"{measured.name}, CKA of all pairs of layers")
    out["cka"] = cka_table(sample, sample)
    out["tokens"], out["sample"] = measured.tokens, len(sample)
    return out


def cka_table(first: HiddenStates, second: HiddenStates) -> list[list[float]]:
    """Unbiased linear CKA of every layer with every layer, from one accumulation."""
    same = first is second
    sides = first.states if same else (*first.states, *second.states)
    covariances = Covariances([f"side {i}" for i in range(len(sides))]).update(*sides)
    offset = 0 if same else len(first.states)
    table = cka_matrix(covariances, unbiased=True)[: len(first.states), offset:]
    return cast("list[list[float]]", table.tolist())


def model_report(
    measured: Measured,
    other: Measured | None = None,
    *,
    name_of: Callable[[int], str] = str,
    clusters: int = 1000,
    k: int = 50,
    tick: Tick = lambda what: None,
) -> Report:
    """The report of a model, or of two on the same text.

    Args:
        name_of: From a token's id to what is shown.
    """
    numbers: dict[str, Any] = {measured.name: curves_of(measured, clusters, k, tick)}
    if other is not None:
        if not torch.equal(measured.sample.tokens, other.sample.tokens):
            raise ValueError("other: expected the same tokens as in the first model; do the tokenizers differ?")
        numbers[other.name] = curves_of(other, clusters, k, tick)
    sections = _curve_sections(numbers)
    sentences = [sentence for name in numbers for sentence in findings(name, numbers[name], other is not None)]
    ticks = _ticks(measured.sample)
    maps: list[Chart] = [
        Heatmap(
            f"CKA of layers{_of(name, numbers)}",
            _short(table["layers"]),
            _short(table["layers"]),
            table["cka"],
            "layer",
            "layer",
        )
        for name, table in numbers.items()
    ]
    if other is not None:
        tick("CKA between the models")
        table = cka_table(measured.sample, other.sample)
        between = Heatmap("CKA between the models", ticks, _ticks(other.sample), table, other.name, measured.name)
        maps.append(between)
        numbers["cka_between"] = table
        last = table[-1][-1]
        sentences.insert(0, f"The last layers of {measured.name} and {other.name} have a CKA of {last:.3f} (1: equal).")
    sections.append(Section("Which layers are alike", "Unbiased linear CKA; 1: equal up to rotation and scale.", maps))
    for one in filter(None, (measured, other)):
        sections.append(_pictures(one, _of(one.name, numbers), name_of, tick))
    return Report(
        title=f"Representations of {measured.name}" + (f" and {other.name}" if other else ""),
        about=f"{measured.tokens:,} tokens of text; {len(measured.sample):,} of them for what needs all pairs",
        findings=sentences,
        sections=sections,
        numbers=numbers,
        notes=_notes(numbers[measured.name]),
    )


def findings(name: str, table: dict[str, Any], named: bool) -> list[str]:
    """What the curves say, in sentences."""
    start = f"{name}: " if named else ""
    information, identity, cosine = table["mutual_information"], table["token_identity"], table["average_cosine"]
    out = [
        f"{start}Mutual information with the input token {_course(information, table['layers'])} (the tokens' entropy"
        f" is {table['token_entropy']:.2f}).",
        f"{start}Of the {table['k']} nearest neighbours {100 * identity[0]:.0f} % are the same token in"
        f" the embeddings and"
        f" {100 * identity[-1]:.0f} % in the last layer.",
    ]
    places, chance = table["position_distance"], table["position_distance_by_chance"]
    out.append(
        f"{start}Neighbours are {places[0]:.1f} positions away in the embeddings and {places[-1]:.1f} in"
        f" the last layer;"
        f" by chance it would be {chance:.1f}, so position is {_kept(places[-1] / chance)} there."
    )
    out += [start + sentence for sentence in _changes(table)]
    worst = max(range(len(cosine)), key=lambda i: cosine[i])
    out.append(
        f"{start}Two tokens' representations have a cosine of {cosine[worst]:.2f} on average in"
        f" {table['layers'][worst]},"
        f" the most of all layers, and {cosine[-1]:.2f} in the last; the last layer uses"
        f" {table['effective_rank'][-1]:.0f} directions (effective rank)."
    )
    return out


def _changes(table: dict[str, Any]) -> list[str]:
    """How much layers change and tokens influence; where few points force correlations to 1, that."""
    if any(table["layer_change_forced"]["all"]):
        return [
            f"How much layers change cannot be said from {table['tokens']:,} tokens: they are fewer than the dimensions"
            " of two layers, which forces correlations to 1; give more text."
        ]
    change = table["layer_change"]
    most = max(range(len(change)), key=lambda i: change[i])
    out = [
        f"Representations change most from {table['layers'][most]} to {table['layers'][most + 1]} (PWCCA distance"
        f" {change[most]:.3g}; the mean over layers is {sum(change) / len(change):.3g})."
    ]
    for key, verb in (("layer_change_by_frequency", "change"), ("token_influence", "influence others")):
        bins = {part: sum(values) / len(values) for part, values in table[key].items() if values}
        if not {"rare", "frequent"} <= set(bins):
            continue
        name = key.removesuffix("_by_frequency")
        points, forced = (table[f"{name}_{what}"] for what in ("points", "forced"))
        if any(forced["rare"]) or any(forced["frequent"]):
            out.append(
                f"Whether rare tokens {verb} more than frequent ones cannot be said from {points['rare']:,} and"
                f" {points['frequent']:,} points: too few for so many dimensions; give more text."
            )
            continue
        out.append(
            f"Rare tokens {verb} {'more' if bins['rare'] > bins['frequent'] else 'less'} than frequent ones:"
            f" {bins['rare']:.3g} against {bins['frequent']:.3g} (mean PWCCA distance, from {points['rare']:,} and"
            f" {points['frequent']:,} points)."
        )
    return out


def _course(values: list[float], layers: list[str]) -> str:
    """A curve in words."""
    lowest = min(range(len(values)), key=lambda i: values[i])
    first, last = f"{values[0]:.2f} nats in the embeddings", f"{values[-1]:.2f} in the last layer"
    if lowest == len(values) - 1:
        return f"falls from {first} to {last}"
    if lowest == 0:
        return f"does not fall below that of the embeddings: {first}, {last}"
    return f"falls, then rises: {first}, {values[lowest]:.2f} in {layers[lowest]}, {last}"


def _kept(share: float) -> str:
    return "well kept" if share < 0.5 else "partly kept" if share < 0.85 else "hardly kept"


def _curve_sections(numbers: dict[str, Any]) -> list[Section]:
    several = len(numbers) > 1
    layers = max((table["layers"] for table in numbers.values()), key=len)

    def curves(key: str, extra: str = "") -> dict[str, Any]:
        found = {name if several else key.replace("_", " "): table[key] for name, table in numbers.items()}
        first = next(iter(numbers.values()))
        return found | ({extra.replace("_", " "): [first[extra]] * len(layers)} if extra else {})

    def lines(title: str, key: str, y_label: str, extra: str = "") -> Lines:
        return Lines(title, _short(layers), curves(key, extra), y_label)

    def by_bin(key: str, title: str) -> list[Chart]:
        return [
            Lines(title + _of(name, numbers), _short(table["layers"][1:]), table[key], "PWCCA distance")
            for name, table in numbers.items()
            if table[key]
        ]

    return [
        Section(
            "What is left of the input token",
            "Mutual information of clusters of representations with the token, corrected for chance; and"
            " how many of the"
            " nearest neighbours are the same token.",
            [
                lines("Mutual information with the token", "mutual_information", "nats", "token_entropy"),
                lines("Token identity", "token_identity", "share of neighbours"),
            ],
        ),
        Section(
            "What is left of the position",
            "How far away in their sentences the nearest neighbours are; the lower, the better position is kept.",
            [lines("Position", "position_distance", "positions", "position_distance_by_chance")],
        ),
        Section(
            "How much each layer changes",
            "PWCCA distance from the layer before, by how frequent the token is in this text. Where"
            " points are few beside"
            " dimensions distances are too small.",
            by_bin("layer_change_by_frequency", "Change by frequency"),
        ),
        Section(
            "How much tokens influence others",
            "PWCCA distance between the other tokens' representations with and without a token, by its frequency.",
            by_bin("token_influence", "Influence by frequency"),
        ),
        Section(
            "Degeneration",
            "The average cosine of two tokens' representations, and how many directions they use.",
            [
                lines("Average cosine", "average_cosine", "cosine"),
                lines("Effective rank", "effective_rank", "directions"),
                lines("IsoScore", "isoscore", "1: isotropic"),
            ],
        ),
    ]


def _of(name: str, numbers: dict[str, Any]) -> str:
    """Added to titles, where there are several models."""
    return f", {name}" if len(numbers) > 1 else ""


def _pictures(measured: Measured, of: str, name_of: Callable[[int], str], tick: Tick) -> Section:
    from sklearn.manifold import TSNE

    sample = measured.sample
    common = sample.tokens.bincount().topk(min(_PICTURED, len(sample.tokens.unique()))).indices
    charts: list[Chart] = []
    shown = sorted({0, len(sample.layers) // 2, len(sample.layers) - 1})
    for i in shown:
        tick(f"{measured.name}, pictures of {sample.layers[i]}")
        some = torch.isin(sample.tokens, common).nonzero()[:, 0]
        some = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(0))[:_TSNE]]
        points = sample.states[i][some].double()
        points = points - points.mean(0)
        groups = (sample.tokens[some][:, None] == common).long().argmax(1).tolist()
        names = [name_of(int(token)) for token in common]
        places = {"PCA": _pca(points)}
        if len(points) > 30:
            embedded = TSNE(2, random_state=0, init="pca", perplexity=20, max_iter=500).fit_transform(points.numpy())
            places["t-SNE"] = torch.from_numpy(embedded).double()
        for method, xy in places.items():
            x, y = xy[:, 0].tolist(), xy[:, 1].tolist()
            title = f"{method}, {sample.layers[i]}{of}"
            charts.append(Scatter(f"{title}: tokens", x, y, groups, names))
            positions = sample.positions[some].double().tolist()
            charts.append(Scatter(f"{title}: position", x, y, values=positions, value_label="position"))
    text = f"The {len(common)} most frequent tokens of the sample; each point is one of them in its sentence."
    return Section(f"Pictures{of}", text, charts)


def _pca(points: Tensor) -> Tensor:
    _, _, directions = torch.linalg.svd(points, full_matrices=False)
    out = points.new_zeros(len(points), 2)
    out[:, : min(2, len(directions))] = points @ directions[:2].T
    return out


def _notes(table: dict[str, Any]) -> list[str]:
    return [
        f"Mutual information: {table['clusters']} clusters by mini-batch k-means, corrected for the chance"
        f" that shuffled"
        " tokens would have (Vinh et al.); plug-in values are in report.json.",
        f"Neighbours are the {table['k']} nearest by cosine among the sample, exactly.",
        "Change and influence: PWCCA by the paper's definition, variances below 1e-10 of the largest removed;"
        " report.json says how many correlations few points force to 1 (layer_change_forced).",
        "Frequency is that in this text: each of the three bins holds about a third of the occurrences. Special tokens"
        " are left out everywhere.",
        "Influence: one token of a sentence at a time is hidden from attention; positions stay.",
    ]


def _ticks(sample: HiddenStates) -> list[str]:
    return _short(sample.layers)


def _short(layers: Any) -> list[str]:
    """Names for ticks: E for the embeddings, then numbers."""
    return ["E" if name == "embeddings" else name.removeprefix("layer ")[-8:] for name in layers]
