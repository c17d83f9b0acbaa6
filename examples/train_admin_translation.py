"""Train a deep post-LN translation model with ADMIN and without, from the same seed, and see which one learns.

    pip install "repdeg-fast[examples]"
    python examples/train_admin_translation.py                        # 18L-6L; minutes on two CPU cores
    python examples/train_admin_translation.py --encoder-layers 60 --decoder-layers 12 --d-model 512  # on a GPU

The data are the English texts of two words or more and their German translations in the gettext catalogues of this
machine, 500 pairs held out; ``--pairs FILE.tsv`` takes others. Curves, ω and what each residual branch explains go to
``--out``. The ADMIN model is evaluated after ``fold_admin``, as a plain ``nn.Transformer``.

Measured with 30,279 training pairs from a Debian machine with programs for developers (torch 2.13, CPU, one thread),
the defaults (width 64, 400 steps, learning rate 2e-3 after 60 steps of warm-up) and seeds 0, 1, 2, by
``--encoder-layers N --seed S --threads 1``; two to three minutes of processor time a run. A model that knows no more
than how frequent each subword is has loss 5.948.

    layers   held-out loss post-LN   ADMIN                  BLEU post-LN    ADMIN
    6-6      5.671, 5.398, 5.513     4.798, 4.833, 4.922    0.1, 4.4, 3.4   2.6, 3.4, 3.9
    9-6      5.677, 5.579, 5.720     4.800, 4.835, 4.752    0.5, 3.5, 0.6   3.3, 2.9, 4.6
    12-6     5.883, 5.827, 5.831     4.924, 4.888, 4.944    0.0, 0.0, 0.0   3.4, 3.2, 2.2
    18-6     5.836, 6.061, 5.870     4.973, 4.967, 4.851    0.0, 0.0, 0.0   2.8, 2.1, 2.6

So 12-6 is the smallest of these depths at which post-LN does not get going with any seed: it stays near the loss of the
frequencies and answers each text with the same few letters. At 6-6 and 9-6 it learns, more slowly.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ranks
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from translation_data import BEGIN, END, PAD, Pair, Subwords, batches, collate, load_pairs

import repdeg_fast
from repdeg_fast.analysis import plot_table, save_table

HELD_OUT = 500  # pairs
LONGEST = 24  # subwords of a text

Batch = tuple[Tensor, Tensor]  # indices (B, S) and (B, T)


class Translator(nn.Module):
    """Token and position embeddings around an encoder-decoder; the output layer is the token embedding."""

    def __init__(self, vocabulary: int, transformer: nn.Transformer) -> None:
        super().__init__()
        d = transformer.d_model
        self.tokens = nn.Embedding(vocabulary, d, padding_idx=PAD)
        self.positions = nn.Embedding(LONGEST + 2, d)
        self.transformer = transformer
        nn.init.normal_(self.tokens.weight, std=d**-0.5)
        nn.init.normal_(self.positions.weight, std=d**-0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of ``target`` (B, T), given ``source`` (B, S)."""
        return self.decode(target, self.encode(source), source == PAD)

    def encode(self, source: Tensor) -> Tensor:
        return self.transformer.encoder(self._embed(source), src_key_padding_mask=source == PAD)

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        length = target.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        hidden = self.transformer.decoder(
            self._embed(target), memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding
        )
        return F.linear(hidden, self.tokens.weight)

    def _embed(self, indices: Tensor) -> Tensor:
        places = torch.arange(indices.shape[1], device=indices.device)
        return (self.tokens(indices) + self.positions(places)) * (self.positions.embedding_dim / 2) ** 0.5

    @torch.no_grad()
    def translate(self, source: Tensor) -> list[list[int]]:
        """The likeliest next token, again and again."""
        memory, padding = self.encode(source), source == PAD
        target = source.new_full((len(source), 1), BEGIN)
        while target.shape[1] <= LONGEST and not (target == END).any(1).all():
            following = self.decode(target, memory, padding)[:, -1].argmax(1, keepdim=True)
            target = torch.cat([target, following], 1)
        return [row[1 : row.index(END) if END in row else None] for row in target.tolist()]


@dataclass(frozen=True)
class Example:
    pair: Pair
    source: list[int]
    target: list[int]


@dataclass
class Run:
    """One model's training."""

    name: str
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    held_out_loss: float = math.nan
    bleu: float = math.nan

    def recent_loss(self) -> float:
        return sum(self.losses[-50:]) / len(self.losses[-50:])

    def __str__(self) -> str:
        steps = len(self.losses)
        return (
            f"{self.name:8} training loss {self.recent_loss():.3f} over the last 50 of {steps} steps, held-out loss "
            f"{self.held_out_loss:.3f}, BLEU {self.bleu:.1f}; {1e3 * self.seconds / steps:.0f} ms a step"
        )


def main() -> None:
    options = parse()
    ranks.start(options)
    torch.set_num_threads(options.threads)
    pairs = load_pairs(options.language, options.pairs)
    subwords = Subwords([text for pair in pairs for text in pair], options.vocabulary)
    held_out, training = split(pairs, subwords)
    print(f"{len(training):,} to train on, {len(held_out):,} held out, {len(subwords):,} subwords")
    print(
        f"a model that knows no more than how frequent each subword is would have loss {frequency_loss(training):.3f}"
    )

    torch.manual_seed(options.seed)
    plain = Translator(len(subwords), build_transformer(options)).to(options.device)
    admin = repdeg_fast.from_torch(plain)
    options.out.mkdir(parents=True, exist_ok=True)
    report_initialization(admin, next(stream(training, options)), options.out)

    runs = [train("post-LN", plain, training, options), train("ADMIN", admin, training, options)]
    ranks.leave_to_the_first()
    for run, model in zip(runs, (plain, repdeg_fast.fold_admin(admin)), strict=True):
        evaluate(run, model.eval(), held_out[: options.translate], subwords, options.device)
        print(run)
    print(f"loss and gradient norm: {plot(runs, options)}")


def build_transformer(options: argparse.Namespace) -> nn.Transformer:
    return nn.Transformer(
        options.d_model,
        options.heads,
        options.encoder_layers,
        options.decoder_layers,
        4 * options.d_model,
        options.dropout,
        batch_first=True,
    )


def split(pairs: list[Pair], subwords: Subwords) -> tuple[list[Example], list[Example]]:
    """Held-out and training pairs, the same for one set of pairs: the first are drawn with a fixed seed."""
    examples = [Example(pair, subwords.encode(pair[0]), subwords.encode(pair[1])) for pair in pairs]
    examples = [example for example in examples if max(len(example.source), len(example.target)) <= LONGEST]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[place] for place in order[:HELD_OUT]], [examples[place] for place in order[HELD_OUT:]]


def frequency_loss(examples: list[Example]) -> float:
    """Entropy of the target subwords: the loss at which a model that does not get going stays."""
    counts = Counter(index for example in examples for index in (*example.target, END))
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def stream(examples: list[Example], options: argparse.Namespace) -> Iterator[Batch]:
    """Endless batches on the device, the same for one seed."""
    indices = [(example.source, example.target) for example in examples]
    for source, target in batches(indices, options.batch, options.seed):
        if len(source) >= ranks.number():  # the rest of an epoch may be a few
            yield ranks.part(source).to(options.device), ranks.part(target).to(options.device)


def report_initialization(admin: nn.Module, batch: Batch, out: Path) -> None:
    """Set ω from one batch; save what it is, and what each branch explains of the output before and after. All of it is
    of all ranks' rows."""
    before = repdeg_fast.residual_dependency(admin, batch)
    table = repdeg_fast.initialize_admin_(admin, batch)
    after = repdeg_fast.residual_dependency(admin, batch)
    if ranks.rank():
        return
    save_table(table, out / "omega.csv")
    for name, shown in (("dependency-post-ln", before), ("omega", table), ("dependency-admin", after)):
        plot_table(shown, out / f"{name}.png")
    omegas = [row.omega for row in table.records]
    print(f"ω of {len(omegas)} sub-layers from {min(omegas):.2f} to {max(omegas):.2f}; table and plots in {out}")


def train(name: str, model: Translator, examples: list[Example], options: argparse.Namespace) -> Run:
    """Adam with a linear warm-up and then the inverse square root of the step; stops where the loss is not finite."""
    torch.manual_seed(options.seed)
    ranks.seed(0, options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
    rate = lambda step: min((step + 1) / options.warmup, (options.warmup / (step + 1)) ** 0.5)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    run, start = Run(name), time.perf_counter()
    with progress() as bar:
        task = bar.add_task(name, total=options.steps, loss=math.nan)
        for _, (source, target) in zip(range(options.steps), stream(examples, options), strict=False):
            optimizer.zero_grad()
            loss = cross_entropy(model, source, target) * ranks.weight((target[:, 1:] != PAD).sum())
            loss.backward()
            ranks.average_gradients(model)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            run.losses.append(ranks.average({"loss": loss.item()}, options.device)["loss"])
            run.gradient_norms.append(norm.item())
            if not math.isfinite(run.losses[-1]):
                break
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, loss=run.recent_loss())
    run.seconds = time.perf_counter() - start
    return run


def cross_entropy(model: Translator, source: Tensor, target: Tensor) -> Tensor:
    logits = model(source, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


def progress() -> Progress:
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
    return Progress(*columns, disable=ranks.rank() > 0)


@torch.no_grad()
def evaluate(run: Run, model: Translator, examples: list[Example], subwords: Subwords, device: torch.device) -> None:
    """Loss and BLEU on the held-out pairs."""
    import sacrebleu

    losses, translations = [], []
    for start in range(0, len(examples), 100):
        part = examples[start : start + 100]
        source, target = (x.to(device) for x in collate([(example.source, example.target) for example in part]))
        losses.append(cross_entropy(model, source, target).item() * len(part))
        translations += [subwords.decode(indices) for indices in model.translate(source)]
    run.held_out_loss = sum(losses) / len(examples)
    run.bleu = sacrebleu.corpus_bleu(translations, [[example.pair[1] for example in examples]]).score
    for example, translation in list(zip(examples, translations, strict=True))[:3]:
        print(f"  {run.name}: {example.pair[0]} → {translation}")


def plot(runs: list[Run], options: argparse.Namespace) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        for axes, values in ((left, run.losses), (right, run.gradient_norms)):
            (line,) = axes.plot(values, linewidth=0.6, alpha=0.3)
            axes.plot(smooth(values), label=run.name, color=line.get_color())
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="gradient norm", yscale="log")
    left.legend()
    figure.suptitle(
        f"{options.encoder_layers}L-{options.decoder_layers}L, width {options.d_model}, "
        f"learning rate {options.learning_rate:g}, warm-up {options.warmup}, seed {options.seed}"
    )
    path = options.out / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def smooth(values: list[float], width: int = 20) -> list[float]:
    """The mean of each value and up to ``width`` - 1 before it."""
    parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--language", default="de", help="of the translations, as in the catalogues' folders (default: de)")
    add("--pairs", type=Path, help="tab-separated file of English and its translation, instead of the catalogues")
    add("--encoder-layers", type=positive, default=18)
    add("--decoder-layers", type=positive, default=6)
    add("--d-model", type=positive, default=64)
    add("--heads", type=positive, default=4)
    add("--dropout", type=float, default=0.1)
    add("--vocabulary", type=int, default=2000, help="subwords")
    add("--steps", type=positive, default=400)
    add("--batch", type=positive, default=32, help="pairs in a batch")
    add("--learning-rate", type=float, default=2e-3)
    add("--warmup", type=positive, default=60, help="steps to the full learning rate")
    add("--seed", type=int, default=0)
    add("--translate", type=positive, default=200, help=f"held-out pairs to translate, {HELD_OUT} at most")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("admin_translation"), help="folder for the curves and tables")
    return parser.parse_args()


if __name__ == "__main__":
    main()
