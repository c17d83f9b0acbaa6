"""What the pretraining examples share: real text that every machine has, word pieces learned from it, training that
goes on where it stopped, curves, and a linear probe of what an encoder knows."""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import pydoc_data.topics
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ranks
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, track
from tokenizers.implementations import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CLASSES = 10  # of the probe: packages of the standard library
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


class Document(NamedTuple):
    source: str  # the package that it describes, or the file
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)


def read_documents(path: Path | None) -> list[Document]:
    """A text file, whose blank lines end paragraphs and whose lines of "#" and a title begin documents; or what the
    standard library says of itself: the help topics of the language, and the docstrings of its modules."""
    if path is not None:
        text = path.read_text(encoding="utf-8")
        return [Document(str(path), paragraphs(part)) for part in text.split("\n# ")]
    topics = [Document("topics", paragraphs(text)) for text in pydoc_data.topics.topics.values()]
    return topics + list(_modules())


def _modules() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if {"site-packages", "test", "tests", "idle_test"} & set(place.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        texts = [inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node, clean=False))]
        found = [part for text in texts for part in paragraphs(text)]
        if found:
            yield Document(place.parts[0].removesuffix(".py"), found)


def paragraphs(text: str, words: int = 6) -> list[str]:
    """Those of at least so many words."""
    parts = (" ".join(part.split()) for part in text.split("\n\n"))
    return [part for part in parts if len(part.split()) >= words]


def learn_word_pieces(texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with BERT's special tokens. (Training of WordPiece breaks ties at random: no run would be like
    another.)"""
    bpe = ByteLevelBPETokenizer(lowercase=True, add_prefix_space=True)
    bpe.train_from_iterator(
        texts, vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    ids = [(token, bpe.token_to_id(token)) for token in (SPECIAL["cls_token"], SPECIAL["sep_token"])]
    bpe._tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    names: dict[str, Any] = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def token_rows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, list[str]]:
    """(N, length): each document's text cut into pieces, each between [CLS] and [SEP], the rest of it left out; and of
    each row the document's source."""
    rows, sources, ends = [], [], torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]])
    for document in documents:
        ids = torch.tensor(tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids)
        pieces = ids[: len(ids) // (length - 2) * (length - 2)].long().view(-1, length - 2)
        around = ends.expand(len(pieces), 2)
        rows.append(torch.cat([around[:, :1], pieces, around[:, 1:]], dim=1))
        sources += [document.source] * len(pieces)
    if not sources:
        raise SystemExit(f"--text: expected a document of at least {length - 2} tokens")
    return torch.cat(rows), sources


def unigram_entropy(tokens: Tensor) -> float:
    """Nats: the loss of a model that knows no more than how often each token occurs."""
    share = torch.bincount(tokens.flatten()).double()
    share = share[share > 0] / share.sum()
    return float(-(share * share.log()).sum())


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def add_training_options(parser: argparse.ArgumentParser, *, text: bool = True, **defaults: Any) -> Callable[..., Any]:
    """Those that every example has; returns ``parser.add_argument``. ``text``: it reads documents."""
    add = parser.add_argument
    if text:
        add("--text", type=Path, help="text file; what the standard library says of itself unless given")
    add("--output", type=Path, default=defaults["output"], help="folder")
    add("--vocabulary-size", type=int, default=2000, help="word pieces, learned from the text")
    add("--steps", type=int, default=defaults["steps"])
    add("--batch-size", type=int, default=defaults["batch_size"])
    add("--sequence-length", type=int, default=defaults.get("sequence_length", 64))
    add("--hidden-size", type=int, default=64)
    add("--heads", type=int, default=2, help="attention heads")
    add("--layers", type=int, default=4)
    add(
        "--learning-rate",
        type=float,
        default=defaults.get("learning_rate", 3e-3),
        help="after a warm-up over a tenth of the steps; falls to 0",
    )
    add("--checkpoint-every", type=int, default=500, help="steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return add


class Training:
    """A model, and all else that a checkpoint holds. Subclasses set ``model`` in :meth:`prepare`, and say what a
    :meth:`loss` is.

    The same options again go on from the last checkpoint in the output folder, with the very numbers that an unbroken
    run would have had. Under torchrun ranks share each batch.
    """

    share = staticmethod(ranks.part)  # of a batch, under torchrun
    FREE_OPTIONS = ("output", "checkpoint_every", "device")  # of a run that is continued, these may differ
    model: nn.Module

    def __init__(self, options: argparse.Namespace) -> None:
        ranks.start(options)
        self.options = options
        self.generator = torch.Generator().manual_seed(options.seed)  # of batches and masks
        torch.manual_seed(options.seed)
        self.prepare()
        self.model = self.model.to(options.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0  # of the processor, in steps
        self.checkpoint = options.output / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()

    def prepare(self) -> None:
        raise NotImplementedError

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """Of the next batch, and the line that it adds to the history."""
        raise NotImplementedError

    def backward(self) -> dict[str, float]:
        """Gradients of the next batch, and its line."""
        loss, line = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        return line

    def step(self) -> dict[str, float]:
        start, done = time.process_time(), self.progress()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * min(done / 0.1, (1 - done) / 0.9)
        ranks.seed(len(self.history), self.options.seed)
        line = ranks.average(self.backward(), self.options.device)
        ranks.average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        self.history.append(line)
        self.seconds += time.process_time() - start
        return line

    def progress(self) -> float:
        """From 0 to 1, where training ends."""
        return (len(self.history) + 1) / (self.options.steps + 1)

    def run(self, console: Console) -> None:
        """To the end, with a progress bar; a checkpoint now and then."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=ranks.rank() > 0) as progress:
            task = progress.add_task("", total=1.0, completed=self.progress())
            while self.progress() < 1:
                line = self.step()
                shown = ", ".join(f"{name} {value:.3g}" for name, value in line.items())
                progress.update(task, completed=self.progress(), description=shown)
                if len(self.history) % self.options.checkpoint_every == 0 or self.progress() == 1:
                    self.save()

    def random_rows(self, rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (self.options.batch_size,), generator=self.generator)]

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.share(value).to(self.options.device) for name, value in batch.items()}

    def save(self) -> None:
        """Under another name first: a run that dies here leaves the last checkpoint as it was. Ranks have the same, and
        any number of them goes on from it."""
        if ranks.rank():
            return
        cuda = torch.cuda.get_rng_state(self.options.device) if self.options.device.startswith("cuda") else None
        state = {
            "options": self._fixed_options(),
            "history": self.history,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": (torch.get_rng_state(), cuda, self.generator.get_state()),
        }
        new = self.checkpoint.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.checkpoint)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        began, now = state["options"], self._fixed_options()
        changed = [f"{name} {began.get(name)} → {now[name]}" for name in now if now[name] != began.get(name)]
        if changed:
            raise SystemExit(f"{self.checkpoint} began with other options ({', '.join(changed)}); change --output")
        self.history, self.seconds = state["history"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        cpu, cuda, batches = state["random"]
        torch.set_rng_state(cpu)
        if cuda is not None and self.options.device.startswith("cuda"):
            torch.cuda.set_rng_state(cuda, self.options.device)
        self.generator.set_state(batches)

    def _fixed_options(self) -> dict[str, str]:
        return {name: str(value) for name, value in vars(self.options).items() if name not in self.FREE_OPTIONS}


class EqualCost(Training):
    """Of an example whose batches it reads: a masked language model trained for as many processor seconds."""

    budget: float
    batch: Callable[[], dict[str, Tensor]]  # of the example

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """After :func:`ranks.leave_to_the_first`."""
        loss = self.model(**self.batch()).loss
        return loss, {"mlm_loss": loss.item()}

    def backward(self) -> dict[str, float]:
        return Training.backward(self)

    def progress(self) -> float:
        return min(1.0, self.seconds / self.budget)

    @classmethod
    def beside(cls, training: Training, console: Console) -> EqualCost:
        """Trained, and reported."""
        plain = cls(argparse.Namespace(**vars(training.options) | {"output": training.options.output / "plain"}))
        plain.budget = training.seconds
        console.print("a masked language model, for as long:")
        plain.run(console)
        report(plain, console)
        return plain


def write_history(history: list[dict[str, float]], folder: Path) -> None:
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def report(training: Training, console: Console) -> None:
    """Each curve's first and last twentieth."""
    history = training.history
    console.print(f"{len(history)} steps, {training.seconds / 60:.1f} processor minutes")
    part = max(1, len(history) // 20)
    for name in history[0]:
        first, last = (sum(line[name] for line in lines) / part for lines in (history[:part], history[-part:]))
        console.print(f"{name:>22}: {first:.4f} → {last:.4f}")


def plot(history: list[dict[str, float]], panels: dict[str, list[str]], path: Path, levels: dict[str, float]) -> bool:
    """Running means over a fiftieth of the run; ``levels``: a panel's dashed line. False: no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    window = max(1, len(history) // 50)
    columns = min(2, len(panels))  # more would be too small to read on a page
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            means = torch.tensor([line[name] for line in history]).unfold(0, window, 1).mean(1)
            axis.plot(range(window, len(history) + 1), means, label=name)
        if title in levels:
            axis.axhline(levels[title], color="gray", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def compare(encoders: dict[str, nn.Module], rows: Tensor, labels: Tensor, console: Console) -> dict[str, float]:
    """The probe: tell a passage's package from the mean of its last hidden states."""
    found = {name: probe(features(encoder.cpu(), rows, console), labels) for name, encoder in encoders.items()}
    number = int(labels.max()) + 1
    console.print(f"package of a passage, {number} of them, {len(rows)} passages, linear probe of frozen features:")
    for name, accuracy in found.items():
        console.print(f"{name:>22}: {accuracy:.3f}")
    return found


@torch.no_grad()
def features(encoder: nn.Module, rows: Tensor, console: Console, batch_size: int = 64) -> Tensor:
    """(N, d): the mean of the last hidden states of each row."""
    encoder.eval()
    parts = track(rows.split(batch_size), "reading", console=console, transient=True)
    return torch.cat([encoder(input_ids=part).last_hidden_state.mean(dim=1) for part in parts])


def probe(vectors: Tensor, labels: Tensor, steps: int = 200, parts: int = 5) -> float:
    """Accuracy of a linear classifier of frozen vectors: trained on four fifths and asked of the last, for each fifth
    in turn."""
    right = torch.zeros(len(labels), dtype=torch.bool)
    for part in torch.arange(len(labels)).chunk(parts):
        rest = torch.ones_like(right).index_fill(0, part, False)
        scaled = (vectors - vectors[rest].mean(0)) / vectors[rest].std(0).clamp(min=1e-6)
        layer = nn.Linear(vectors.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(layer(scaled[rest]), labels[rest]).backward()
            optimizer.step()
        right[part] = layer(scaled[part]).argmax(1) == labels[part]
    return right.double().mean().item()


def labelled_rows(rows: Tensor, sources: list[str], classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The rows of the most frequent sources, equally many of each, in random order, and the number of their source."""
    names = sorted({*sources}, key=lambda name: (-sources.count(name), name))[:classes]
    index = [torch.tensor([i for i, source in enumerate(sources) if source == name]) for name in names]
    each, generator = min(map(len, index)), torch.Generator().manual_seed(seed)
    chosen = [part[torch.randperm(len(part), generator=generator)[:each]] for part in index]
    order = torch.randperm(each * len(names), generator=generator)
    return rows[torch.cat(chosen)[order]], torch.arange(len(names)).repeat_interleave(each)[order]
