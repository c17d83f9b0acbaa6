"""Pretrain a small AMOS on real text, on a CPU or a GPU, and probe what its encoder knows.

    python examples/pretrain_amos.py                          # the standard library's own text, minutes on two cores
    python examples/pretrain_amos.py --text book.txt --steps 5000 --output book

The same command again goes on from the last checkpoint in the output folder, with the very numbers that an unbroken
run would have had. At its end the folder holds checkpoint.pt, amos/ (the model), encoder/ (the discriminator, a
BertModel to fine-tune, with its tokenizer), history.csv and history.png.

--probe also trains a plain masked language model of equal cost, and compares linear classifiers of frozen features.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from pretraining import (
    HelpFormatter,
    Training,
    add_training_options,
    features,
    labelled_rows,
    learn_word_pieces,
    plot,
    probe,
    read_documents,
    report,
    token_rows,
    unigram_entropy,
    write_history,
)
from rich.console import Console
from torch import Tensor
from transformers import BertForMaskedLM

from repdeg_fast.data import MaskingCollator
from repdeg_fast.integrations import huggingface
from repdeg_fast.models.amos import MIXTURES, AmosBertConfig, AmosBertModel, AmosConfig, AmosForPreTraining

CLASSES = 10  # of the probe: packages of the standard library


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = add_training_options(parser, output="amos", steps=3000, batch_size=32)
    add("--mlm-layers", type=int, nargs="+", default=[1, 2, 4], help="generator layers with a language-model head")
    add("--mixture", choices=MIXTURES, default="learned", help="of the heads")
    add("--gradient-scale", type=float, default=-1.0, help="of the discriminator's gradient in the mixture")
    add("--rtd-weight", type=float, default=50.0, help="of the discriminator's loss")
    add("--whole-words", action="store_true", help="mask whole words")
    add(
        "--probe",
        action="store_true",
        help="compare with a masked language model trained as long, and with random features",
    )
    return parser.parse_args(arguments)


class Pretraining(Training):
    def prepare(self) -> None:
        options = self.options
        documents = read_documents(options.text)
        self.tokenizer = learn_word_pieces((document.text for document in documents), options.vocabulary_size)
        self.data, self.sources = token_rows(documents, self.tokenizer, options.sequence_length)
        self.collator = MaskingCollator.from_tokenizer(
            self.tokenizer, whole_words=options.whole_words, generator=self.generator
        )
        self.model = self.make_model()

    def make_model(self) -> torch.nn.Module:
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """Of the encoder, with relative positions as the authors have them. No dropout: a few passes over the text do
        not wear it out. Initial weights are larger than BERT's 0.02, which is meant for a width of 768."""
        return {
            "relative_position_buckets": 32,
            "token_types": False,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.06,
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "hidden_size": self.options.hidden_size,
            "intermediate_size": 4 * self.options.hidden_size,
            "num_hidden_layers": self.options.layers,
            "num_attention_heads": self.options.heads,
            "max_position_embeddings": self.options.sequence_length,
        }

    def batch(self) -> dict[str, Tensor]:
        return self.on_device(self.collator(self.random_rows(self.data)))


class Amos(Pretraining):
    model: AmosForPreTraining

    def make_model(self) -> AmosForPreTraining:
        names = ("mlm_layers", "mixture", "gradient_scale", "rtd_weight")
        return AmosForPreTraining(AmosConfig(**self.sizes(), **{name: getattr(self.options, name) for name in names}))

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        self.model.progress = len(self.history) / self.options.steps
        output = self.model(**self.batch())
        layers = self.model.config.mlm_layers
        line = {f"mlm_loss_{layer}": loss for layer, loss in zip(layers, output.mlm_losses.tolist(), strict=True)}
        line |= {f"weight_{layer}": share for layer, share in zip(layers, output.mixture_weights.tolist(), strict=True)}
        line |= {name: output[name].item() for name in ("rtd_loss", "rtd_accuracy")}
        return output.loss, line | {"always_original": 1 - output.replaced.item()}


class Plain(Pretraining):
    """A masked language model of BERT's kind, of the discriminator's size."""

    model: BertForMaskedLM

    def make_model(self) -> BertForMaskedLM:
        config = AmosBertConfig(**self.sizes())
        model = BertForMaskedLM(config)
        model.bert = AmosBertModel(config)
        model.tie_weights()
        return huggingface.apply(model)

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        loss = self.model(**self.batch()).loss
        return loss, {"mlm_loss": loss.item()}


def main(arguments: list[str] | None = None) -> Amos:
    options, console = parse(arguments), Console()
    training = Amos(options)
    entropy, start = unigram_entropy(training.data[:, 1:-1]), time.perf_counter()
    training.run(console)
    seconds = time.perf_counter() - start
    training.model.save_pretrained(options.output / "amos")
    training.model.discriminator_encoder().save_pretrained(options.output / "encoder")
    training.tokenizer.save_pretrained(options.output / "encoder")
    history = training.history
    write_history(history, options.output)
    report(history, console)
    console.print(f"how often each token occurs alone gives a masked loss of {entropy:.2f}")
    panels = {
        "masked loss of each layer": [name for name in history[0] if name.startswith("mlm_loss")],
        "mixture weights": [name for name in history[0] if name.startswith("weight")],
        "discriminator's loss": ["rtd_loss"],
        "discriminator's accuracy": ["rtd_accuracy", "always_original"],
    }
    if not plot(history, panels, options.output / "history.png", {"masked loss of each layer": entropy}):
        console.print("no plot: pip install matplotlib")
    if options.probe:
        compare(training, seconds, console)
    return training


def compare(training: Amos, seconds: float, console: Console) -> None:
    """The probe: tell a passage's package from the mean of its last hidden states."""
    plain = Plain(argparse.Namespace(**vars(training.options) | {"output": training.options.output / "plain"}))
    console.print(f"a masked language model, for {seconds:.0f} s as well")
    plain.options.output.mkdir(exist_ok=True)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds and len(plain.history) < plain.options.steps:
        plain.step()
    rows, labels = labelled_rows(training.data, training.sources, CLASSES)
    torch.manual_seed(training.options.seed)
    encoders = {
        "AMOS": training.model.discriminator,
        f"masked language model ({len(plain.history)} steps)": plain.model.bert,
        "random": AmosBertModel(AmosBertConfig(**training.sizes())),
    }
    console.print(f"package of a passage, {int(labels.max()) + 1} of them, linear probe of frozen features:")
    for name, encoder in encoders.items():
        console.print(f"{name:>40}: {probe(features(encoder.cpu(), rows, console), labels):.3f}")


if __name__ == "__main__":
    main()
