"""Train three small encoders on the same English text from the same start, for translation (MT), as a left-to-right
language model (LM) and as a masked one (MLM), and draw how representations evolve from layer to layer in each (The
Bottom-up Evolution of Representations in the Transformer, arXiv 1909.01380).

    pip install "repdeg_fast[examples]"
    python examples/bottom_up_evolution.py                       # six minutes on one CPU core
    python examples/bottom_up_evolution.py --yardstick           # with a second start of each task, twice the time

Measured with 33,585 training pairs from a Debian machine with programs for developers, 3,731 held out (torch 2.13, one
thread, 325 s of processor time by the first command; seed 0). Held-out losses are 2.82 (MT), 3.48 (LM) and 4.40 (MLM),
where how often each token occurs alone gives 5.98 for MT and 5.81 for the others. Of the paper's findings

- show: LM learns the next token meanwhile (1.13 nats of mutual information in the embeddings, 1.49 in the last layer);
  MT and MLM are closer to each other than to LM (last layer: 0.449; MT to LM 0.525, MLM to LM 0.496); frequent tokens
  change more than rare ones (MT 0.066 and 0.059, LM 0.081 and 0.069); MLM keeps token identity best (0.546 of the
  neighbours in the last layer; LM 0.490, MT 0.432); MT keeps position best (4.5 positions away; MLM 5.2, LM 5.3, by
  chance 6.0);
- show in part: LM forgets the input token (5.04 → 4.97 → 4.81 → 4.56 nats from layer 1 on, but 4.70 in the embeddings,
  presumably since positions, as long as words there, part what 500 clusters would hold together);
- do not show: MLM forgets the input token, then recovers it (4.67 → 4.88 → 4.87 → 4.84 from layer 1 on); MT forgets
  less of it than LM (3.84 against 4.56 in the last layer); MT changes less and less (0.056 → 0.061 → 0.058 → 0.064);
  rare tokens influence others more than frequent ones in each task (clearly in MT alone: 0.006 and 0.004).

These are models of 4 layers × 64 after minutes; the paper's have 6 × 512 and see millions of sentences.

The same command again goes on from the last checkpoints in the output folder. At its end the folder holds a folder a
model with checkpoint.pt and history.csv, curves.json (every number) and curves.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import ranks
import torch
from pretraining import HelpFormatter, Training, add_training_options, write_history
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from translation_data import BEGIN, END, PAD, Subwords, collate, load_pairs

from repdeg_fast import analysis, linear_cross_entropy

TASKS = ("MT", "LM", "MLM")
BINS = ("rare", "middle", "frequent")  # a third of the occurrences each
HELD_OUT = 4000  # pairs at most, and a tenth of all
IGNORED = -100


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = add_training_options(
        parser, text=False, output="bottom_up_evolution", steps=1600, batch_size=48, sequence_length=32,
        learning_rate=2e-3,
    )  # fmt: skip
    add("--language", default="de", help="of the translations, as in the catalogues' folders")
    add("--pairs", type=Path, help="tab-separated file of English and its translation, instead of the catalogues")
    add("--decoder-layers", type=int, default=2, help="for MT")
    add("--points", type=int, default=10_000, help="tokens for mutual information and neighbours")
    add("--clusters", type=int, default=500, help="for mutual information")
    add("--yardstick", action="store_true", help="train each task from a second start, to compare distances with")
    return parser.parse_args(arguments)


class Encoder(nn.Module):
    """The same for all tasks, but that a language model looks to the left only."""

    def __init__(self, vocabulary: int, options: argparse.Namespace, causal: bool) -> None:
        super().__init__()
        d = options.hidden_size
        self.words = nn.Embedding(vocabulary, d, padding_idx=PAD)
        self.positions = nn.Embedding(options.sequence_length, d)
        layer = nn.TransformerEncoderLayer(d, options.heads, 4 * d, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False)
        self.causal = causal
        for parameter in self.layers.parameters():  # the layers are copies of one
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=d**-0.5)

    def embed(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return (self.words(ids) + self.positions(places)) * (self.words.embedding_dim / 2) ** 0.5

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = _causal(input_ids) if self.causal else None
        return self.layers(
            self.embed(input_ids), mask=mask, is_causal=self.causal, src_key_padding_mask=attention_mask == 0
        )


def _causal(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)


class Text(NamedTuple):
    """Pairs as ids, the English between BEGIN and END."""

    training: list[tuple[list[int], list[int]]]
    held_out: list[tuple[list[int], list[int]]]
    vocabulary: int
    mask: int


def read_text(options: argparse.Namespace) -> Text:
    pairs = load_pairs(options.language, options.pairs)
    subwords = Subwords([text for pair in pairs for text in pair], options.vocabulary_size)
    longest = options.sequence_length - 2
    ids = [(subwords.encode(source), subwords.encode(target)) for source, target in pairs]
    ids = [([BEGIN, *source, END], target) for source, target in ids if max(len(source), len(target)) <= longest]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    cut = min(HELD_OUT, len(ids) // 10)
    return Text([ids[i] for i in order[cut:]], [ids[i] for i in order[:cut]], len(subwords) + 1, len(subwords))


class Model(nn.Module):
    """An encoder, its task's output layer (the word embedding), and for MT a decoder."""

    def __init__(self, task: str, text: Text, options: argparse.Namespace) -> None:
        super().__init__()
        self.task, self.mask = task, text.mask
        self.encoder = Encoder(text.vocabulary, options, causal=task == "LM")  # first: the same start for all tasks
        self.bias = nn.Parameter(torch.zeros(text.vocabulary))
        if task == "MT":
            d = options.hidden_size
            layer = nn.TransformerDecoderLayer(d, options.heads, 4 * d, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, options.decoder_layers)

    def forward(self, source: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """The task's loss of pairs (B, S) and (B, T): under torchrun of this rank's, weighted by what it predicts."""
        seen = labels = source
        if self.task == "MLM":
            seen, labels = masked(source, self.mask, generator)
        source, target, seen, labels = map(ranks.part, (source, target, seen, labels))
        hidden = self.encoder(seen, source != PAD)
        if self.task == "MT":
            hidden, labels = self.decode(target[:, :-1], hidden, source == PAD), target[:, 1:]
        elif self.task == "LM":
            hidden, labels = hidden[:, :-1], source[:, 1:]
        wanted = (labels != PAD) & (labels != IGNORED)
        loss = linear_cross_entropy(hidden[wanted], self.encoder.words.weight, labels[wanted], self.bias)
        return loss * ranks.weight(wanted.sum())

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        return self.decoder(
            self.encoder.embed(target), memory, tgt_mask=_causal(target), tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )  # fmt: skip


def masked(ids: Tensor, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's: of 15 % of the tokens to predict 80 % are hidden and 10 % are others; and labels, IGNORED elsewhere."""
    dice = torch.rand((2, *ids.shape), generator=generator).to(ids.device)
    others = torch.randint(END + 1, mask, ids.shape, generator=generator).to(ids.device)
    chosen = (dice[0] < 0.15) & (ids > END)
    chosen[:, 1] |= ~chosen.any(1) & (ids[:, 1] > END)  # short texts have something to predict, too
    seen = torch.where(chosen & (dice[1] < 0.8), mask, ids)
    seen = torch.where(chosen & (dice[1] >= 0.9), others, seen)
    return seen, ids.masked_fill(~chosen, IGNORED)


class Run(Training):
    FREE_OPTIONS = (*Training.FREE_OPTIONS, "points", "clusters", "yardstick")
    model: Model

    def __init__(self, task: str, text: Text, options: argparse.Namespace) -> None:
        self.task, self.text = task, text
        super().__init__(options)

    def prepare(self) -> None:
        self.model = Model(self.task, self.text, self.options)

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """Of pairs of like length."""
        size, pairs = self.options.batch_size, self.text.training
        drawn = torch.randint(len(pairs), (8 * size,), generator=self.generator).tolist()
        near = sorted(drawn, key=lambda place: len(pairs[place][0]))
        first = size * int(torch.randint(8, (), generator=self.generator))
        source, target = collate([pairs[place] for place in near[first : first + size]])
        loss = self.model(source.to(self.options.device), target.to(self.options.device), self.generator)
        return loss, {f"{self.task} loss": loss.item()}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        self.model.eval()
        generator, losses = torch.Generator().manual_seed(0), []
        for part in _parts(self.text.held_out):
            source, target = (ids.to(self.options.device) for ids in collate(part))
            losses.append(self.model(source, target, generator).item() * len(part))
        self.model.train()
        return sum(losses) / len(self.text.held_out)


def _parts(pairs: list[Any], size: int = 100) -> list[list[Any]]:
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def evolution(runs: dict[str, Run], text: Text, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every curve, of the held-out English; entry 0 of a curve is the embeddings, of changes and influences layer 1."""
    batches = []
    for part in _parts(text.held_out):
        ids = collate(part)[0]
        batches.append({"input_ids": ids, "attention_mask": (ids != PAD).long()})
    counts = torch.cat([batch["input_ids"].flatten() for batch in batches]).bincount(minlength=text.vocabulary)
    counts[: END + 1] = 0
    bins = analysis.frequency_bins(counts, len(BINS))
    hidden = {}
    for name in track(runs, "hidden states", console=console, transient=True):
        found = analysis.collect(runs[name].model.encoder, batches)
        inside = torch.isin(found.tokens, torch.tensor([BEGIN]), invert=True)
        hidden[name] = found.select(inside & (found.tokens != END))
    first = next(iter(hidden.values()))
    following = _next_tokens(batches)
    some = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))[: options.points]
    tokens, positions = first.tokens[some], first.positions[some]
    curves: dict[str, Any] = {"position by chance": analysis.position_distance_by_chance(positions, tokens)}
    for name in track(TASKS, "curves", console=console, transient=True):
        states = [state[some] for state in hidden[name].states]
        change = analysis.layer_change(hidden[name], bins)
        influence = analysis.token_influence(runs[name].model.encoder, batches, bins)
        by_bin = {"change": change.by_bin(), "influence": influence}
        information = [analysis.mutual_information(state, tokens, options.clusters) for state in states]
        curves[name] = {
            "mutual information": [found.corrected for found in information],
            "with the next token": [
                analysis.mutual_information(state, following[some], options.clusters).corrected for state in states
            ],
            "token identity": [analysis.token_identity(state, tokens) for state in states],
            "position distance": [analysis.position_distance(state, positions, tokens) for state in states],
            "change": [found.distance for found in change.overall()],
        } | {
            f"{what} of {BINS[part]} tokens": [found.distance for found in layers]
            for what, parts in by_bin.items()
            for part, layers in parts.items()
        }
    curves["entropy of the tokens"] = information[0].entropy
    curves["distance"] = task_distances(hidden)
    return curves


def _next_tokens(batches: list[dict[str, Tensor]]) -> Tensor:
    """Of every token but BEGIN and END, in the order of the hidden states."""
    parts = []
    for ids in (batch["input_ids"] for batch in batches):
        parts.append(ids[:, 1:][ids[:, :-1] > END])
    return torch.cat(parts)


def task_distances(hidden: dict[str, analysis.HiddenStates]) -> dict[str, list[float]]:
    """PWCCA distance of two models by layer."""
    names = list(hidden)
    out: dict[str, list[float]] = {}
    for states in zip(*(found.states for found in hidden.values()), strict=True):
        covariances = analysis.Covariances(names).update(*states)
        for i, first in enumerate(names):
            for j in range(i + 1, len(names)):
                distance = analysis.pwcca(covariances.of(i, j)).distance
                out.setdefault(f"{first} – {names[j]}", []).append(distance)
    return out


class Finding(NamedTuple):
    of_the_paper: str
    shows: bool
    here: str


def findings(curves: dict[str, Any]) -> list[Finding]:
    """What the paper found, and whether these curves say so."""
    mt, lm, mlm = (curves[task] for task in TASKS)
    name = "mutual information"
    lowest = min(mlm[name])
    rise = mlm[name][-1] - lowest
    between, top = curves["distance"], -1
    apart = {pair: between[pair][top] for pair in ("MT – LM", "MT – MLM", "LM – MLM")}

    def mean(task: str, what: str) -> dict[str, float]:
        return {part: sum(curves[task][f"{what} of {part} tokens"]) / len(curves[task]["change"]) for part in BINS}

    def rare_and_frequent(what: str, tasks: tuple[str, ...] = TASKS) -> str:
        means = {task: mean(task, what) for task in tasks}
        return ", ".join(f"{task} {found['rare']:.3g} and {found['frequent']:.3g}" for task, found in means.items())

    def last(what: str) -> str:
        return ", ".join(f"{task} {curves[task][what][-1]:.3g}" for task in TASKS)

    out = [
        Finding(
            "LM forgets the input token layer by layer",
            all(later < earlier for earlier, later in zip(lm[name], lm[name][1:], strict=False)),
            " → ".join(f"{value:.2f}" for value in lm[name]) + " nats",
        ),
        Finding(
            "LM learns the next token meanwhile",
            lm["with the next token"][-1] == max(lm["with the next token"]),
            " → ".join(f"{value:.2f}" for value in lm["with the next token"]) + " nats",
        ),
        Finding(
            "MT forgets less of it than LM", mt[name][-1] > lm[name][-1], f"{mt[name][-1]:.2f} and {lm[name][-1]:.2f}"
        ),
        Finding(
            "MLM forgets it, then recovers it",
            0 < mlm[name].index(lowest) < len(mlm[name]) - 1 and rise > 0.05 * (mlm[name][0] - lowest),
            " → ".join(f"{value:.2f}" for value in mlm[name]) + " nats",
        ),
        Finding(
            "MT and MLM are closer to each other than to LM",
            apart["MT – MLM"] == min(apart.values()),
            "last layer: " + ", ".join(f"{pair} {value:.3f}" for pair, value in apart.items()),
        ),
        Finding(
            "MT changes less and less, layer by layer",
            all(later < earlier for earlier, later in zip(mt["change"], mt["change"][1:], strict=False)),
            " → ".join(f"{value:.3f}" for value in mt["change"]),
        ),
        Finding(
            "frequent tokens change more than rare ones (MT, LM)",
            all(mean(task, "change")["frequent"] > mean(task, "change")["rare"] for task in ("MT", "LM")),
            "rare and frequent: " + rare_and_frequent("change", ("MT", "LM")),
        ),
        Finding(
            "rare tokens influence more than frequent ones",
            all(mean(task, "influence")["rare"] > mean(task, "influence")["frequent"] for task in TASKS),
            "rare and frequent: " + rare_and_frequent("influence"),
        ),
        Finding(
            "MLM keeps token identity best",
            mlm["token identity"][-1] == max(curves[task]["token identity"][-1] for task in TASKS),
            "last layer: " + last("token identity"),
        ),
        Finding(
            "MT keeps position best",
            mt["position distance"][-1] == min(curves[task]["position distance"][-1] for task in TASKS),
            f"last layer: {last('position distance')}; by chance {curves['position by chance']:.3g}",
        ),
    ]
    starts = {task: between[f"{task} – {task} again"][top] for task in TASKS if f"{task} – {task} again" in between}
    if starts:
        told = ", ".join(f"{task} {value:.3f}" for task, value in starts.items())
        out.append(
            Finding(
                "another start matters less than another task",
                max(starts.values()) < min(apart.values()),
                f"last layer, of two starts: {told}; of two tasks: {min(apart.values()):.3f} at least",
            )
        )
    return out


def draw(curves: dict[str, Any], path: Path) -> bool:
    """False: no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(16, 11), layout="constrained")
    axes = figure.subplots(3, 4)
    colours = dict(zip(TASKS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for axis, (name, unit) in zip(
        axes.flat,
        {
            "mutual information": "nats", "with the next token": "nats", "token identity": "share of neighbours",
            "position distance": "positions", "change": "PWCCA distance",
        }.items(),
        strict=False,
    ):  # fmt: skip
        for task in TASKS:
            values = curves[task][name]
            start = 1 if name == "change" else 0
            axis.plot(range(start, start + len(values)), values, marker="o", label=task, color=colours[task])
        axis.set(title=f"MI {name}" if name.startswith("with") else name, xlabel="layer", ylabel=unit)
    axes.flat[3].axhline(curves["position by chance"], color="gray", linestyle="--", linewidth=1)
    for pair, values in curves["distance"].items():
        axes.flat[5].plot(values, marker="o", label=pair, linestyle="--" if "again" in pair else "-")
    axes.flat[5].set(title="distance between models", xlabel="layer", ylabel="PWCCA distance")
    for axis, (what, task) in zip(axes.flat[6:], ((w, t) for w in ("change", "influence") for t in TASKS), strict=True):
        for part in BINS:
            values = curves[task][f"{what} of {part} tokens"]
            axis.plot(range(1, 1 + len(values)), values, marker="o", label=part)
        axis.set(title=f"{what} by frequency, {task}", xlabel="layer", ylabel="PWCCA distance")
    for axis in axes.flat:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return True


def main(arguments: list[str] | None = None) -> list[Finding]:
    options, console = parse(arguments), Console()
    ranks.start(options)
    text = read_text(options)
    console.print(f"{len(text.training):,} pairs to train on, {len(text.held_out):,} held out")
    runs: dict[str, Run] = {}
    starts = [(task, task, options.seed) for task in TASKS]
    if options.yardstick:
        starts += [(f"{task} again", task, options.seed + 1) for task in TASKS]
    for name, task, seed in starts:
        own = {"output": options.output / name.lower().replace(" ", "-"), "seed": seed}
        runs[name] = Run(task, text, argparse.Namespace(**vars(options) | own))
        runs[name].run(console)
    ranks.leave_to_the_first()
    for name, run in runs.items():
        write_history(run.history, run.options.output)
        console.print(f"{name}: loss {run.held_out_loss():.3f} on the held-out pairs")
    curves = evolution(runs, text, options, console)
    (options.output / "curves.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    found = findings(curves)
    for finding in found:
        mark = "[green]shows[/]" if finding.shows else "[red]does not show[/]"
        console.print(f"{mark}: {finding.of_the_paper} ({finding.here})")
    if not draw(curves, options.output / "curves.png"):
        console.print("no pictures: pip install matplotlib")
    return found


if __name__ == "__main__":
    main()
