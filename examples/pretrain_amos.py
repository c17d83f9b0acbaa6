"""Pretrain a small AMOS on real text, on a CPU or a GPU, and probe what its encoder knows.

    python examples/pretrain_amos.py --probe                  # the standard library's own text, minutes on two cores
    python examples/pretrain_amos.py --text book.txt --steps 5000 --output book

The same command again goes on from the last checkpoint in the output folder, with the very numbers that an unbroken
run would have had. At its end the folder holds checkpoint.pt, amos/ (the model), encoder/ (the discriminator, a
ModernBertModel to fine-tune, with its tokenizer), history.csv and history.png.

--probe also trains a plain masked language model of equal cost, and compares linear classifiers of frozen features.

The first command, 2.2 processor minutes for AMOS on one of two cores of a busy AMD EPYC, gave, as means of the first
and the last 90 steps:

    masked loss after layers 1, 2, 4    6.98, 6.98, 6.98 → 5.09, 4.88, 4.86    token frequencies alone: 6.36
    mixture weights                     0.32, 0.34, 0.34 → 0.03, 0.09, 0.88
    discriminator's loss                           0.502 → 0.357               the best constant answer: 0.396
    discriminator's accuracy                       0.784 → 0.870               always "original": 0.865

and the probe, of 1,780 passages (sampling error about 0.012): AMOS 0.571, masked language model 0.589 (4,130 steps for
the same cost, masked loss 3.82), random 0.517. AMOS's encoder is about as good as the plain
one; that it is better does not show at this size.
"""

from __future__ import annotations

import argparse

import ranks
import torch
from pretraining import (
    CLASSES,
    EqualCost,
    HelpFormatter,
    Training,
    add_training_options,
    compare,
    labelled_rows,
    learn_word_pieces,
    plot,
    read_documents,
    report,
    token_rows,
    unigram_entropy,
    write_history,
)
from rich.console import Console
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from repdeg_fast.data import IGNORE_INDEX, MaskingCollator
from repdeg_fast.integrations import huggingface
from repdeg_fast.models.amos import MIXTURES, AmosConfig, AmosForPreTraining


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = add_training_options(parser, output="amos", steps=1800, batch_size=16)
    add("--mlm-layers", type=int, nargs="+", default=[1, 2, 4], help="generator layers with a language-model head")
    add("--mixture", choices=MIXTURES, default="learned", help="of the heads")
    add("--gradient-scale", type=float, default=-1.0, help="of the discriminator's gradient in the mixture")
    add("--rtd-weight", type=float, default=10.0, help="of the discriminator's loss; 50 in the paper")
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

    def backbone(self) -> ModernBertConfig:
        """Layers normalized on the way in and attention to near positions get going within a few hundred steps, where
        layers of BERT stay for a thousand at what token frequencies tell. Initial weights are larger than the default
        0.02, which is meant for a width of 768."""
        options, tokens = self.options, self.tokenizer
        return ModernBertConfig(
            vocab_size=len(tokens), pad_token_id=tokens.pad_token_id, cls_token_id=tokens.cls_token_id,
            sep_token_id=tokens.sep_token_id, bos_token_id=tokens.cls_token_id, eos_token_id=tokens.sep_token_id,
            hidden_size=options.hidden_size, intermediate_size=2 * options.hidden_size,
            num_hidden_layers=options.layers, num_attention_heads=options.heads, local_attention=16,
            max_position_embeddings=options.sequence_length, initializer_range=0.06,
        )  # fmt: skip

    def batch(self) -> dict[str, Tensor]:
        return self.on_device(self.collator(self.random_rows(self.data)))


class Amos(Pretraining):
    model: AmosForPreTraining

    def make_model(self) -> AmosForPreTraining:
        names = ("mlm_layers", "mixture", "gradient_scale", "rtd_weight")
        chosen = {name: getattr(self.options, name) for name in names}
        return AmosForPreTraining(AmosConfig(backbone=self.backbone(), **chosen))

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        self.model.progress = len(self.history) / self.options.steps
        batch = self.batch()
        output, layers = self.model(**batch), self.model.config.mlm_layers
        weight = ranks.weight((batch["labels"] != IGNORE_INDEX).sum())
        means = torch.stack([output.mlm_losses.detach(), output.mixture_weights]) * weight  # over masked positions
        names = [f"{name}_{layer}" for name in ("mlm_loss", "weight") for layer in layers]
        line = dict(zip(names, means.flatten().tolist(), strict=True))
        weight = ranks.weight(batch["labels"].new_tensor(len(batch["labels"])))  # all rows are as long
        line |= {name: weight * output[name].item() for name in ("rtd_loss", "rtd_accuracy")}
        return output.loss, line | {"always_original": weight * (1 - output.replaced.item())}


class Plain(EqualCost, Pretraining):
    """A masked language model of the discriminator's kind and size."""

    model: ModernBertForMaskedLM

    def make_model(self) -> ModernBertForMaskedLM:
        return huggingface.apply(ModernBertForMaskedLM(self.backbone()))


def main(arguments: list[str] | None = None) -> Amos:
    options, console = parse(arguments), Console()
    training = Amos(options)
    entropy = unigram_entropy(training.data[:, 1:-1])
    training.run(console)
    ranks.leave_to_the_first()
    training.model.save_pretrained(options.output / "amos")
    training.model.discriminator_encoder().save_pretrained(options.output / "encoder")
    training.tokenizer.save_pretrained(options.output / "encoder")
    history = training.history
    write_history(history, options.output)
    report(training, console)
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
        plain = Plain.beside(training, console)
        torch.manual_seed(options.seed)
        encoders = {
            "AMOS": training.model.discriminator,
            "masked language model": plain.model.base_model,
            "random": ModernBertModel(training.backbone()),
        }
        compare(encoders, *labelled_rows(training.data, training.sources, CLASSES), console)
    return training


if __name__ == "__main__":
    main()
