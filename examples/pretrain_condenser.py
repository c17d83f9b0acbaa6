"""Pretrain a small Condenser, or with --contrastive a coCondenser, on real text, on a CPU or a GPU; before and after,
find one span of a document by another.

    python examples/pretrain_condenser.py --probe             # the standard library's own text, minutes on two cores
    python examples/pretrain_condenser.py --probe --contrastive --output cocondenser

The same command again goes on from the last checkpoint in the output folder, with the very numbers that an unbroken
run would have had. At its end the folder holds checkpoint.pt, condenser/ (the encoder, which AutoModel loads, its
tokenizer, and the head), history.csv and history.png.

Retrieval: held-out documents give two spans each, never seen in training; the CLS of one is compared by dot product
with those of all others. recall@k: how often its partner is among the k nearest. --probe also trains a plain masked
language model of equal cost, and compares retrieval, and linear classifiers of frozen features.

The second command, 1.4 processor minutes for coCondenser on one of two cores of a busy AMD EPYC, gave, as means of
the first and the last 80 steps:

    masked loss after the head     7.17 → 5.52     token frequencies alone: 6.36
    masked loss of the encoder     7.17 → 5.55
    contrastive loss               3.37 → 1.83     31 others in a batch: ln 31 = 3.43
    recall@1 of 200 documents     0.090 → 0.200
    recall@10                     0.260 → 0.585

    of the same cost                   recall@1   recall@10   probe, of 3,850 passages (sampling error 0.008)
    coCondenser                           0.200       0.585   0.639
    masked language model, 2,291 steps    0.060       0.310   0.470
    random weights                        0.090       0.260   0.408

The first command, as long: masked losses 7.13 → 5.52 both; Condenser recall 0.055, 0.250, probe 0.459; masked language
model (2,498 steps) 0.065, 0.285, 0.468. Condenser alone is not told from it at this size, without fine-tuning.
"""

from __future__ import annotations

import argparse
from typing import Any

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
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from repdeg_fast.data import IGNORE_INDEX, SpanPairCollator
from repdeg_fast.integrations import huggingface
from repdeg_fast.models.condenser import CoCondenserForPreTraining, CondenserForPreTraining, CondenserOutput
from repdeg_fast.training import cached_backward

HELD_OUT = 200  # documents


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = add_training_options(
        parser, output="condenser", steps=1600, batch_size=32, sequence_length=32, learning_rate=2e-3
    )
    add("--contrastive", action="store_true", help="coCondenser: pairs of spans of one document find each other")
    add("--chunk-size", type=int, default=0, help="with --contrastive: rows that are encoded at once; 0: all")
    add("--head-layers", type=int, default=2, help="of the head")
    add("--skip-from", type=int, default=2, help="layer whose states the head sees beside the late CLS")
    add("--probe", action="store_true", help="compare with a masked language model trained as long")
    add("--spans", type=int, default=4, help="of a document; longer ones become several documents")
    return parser.parse_args(arguments)


class Pretraining(Training):
    model: Any  # CondenserForPreTraining
    share = staticmethod(ranks.rows)  # pairs, and as many a rank

    def prepare(self) -> None:
        options, texts = self.options, read_documents(self.options.text)
        self.tokenizer = learn_word_pieces((text.text for text in texts), options.vocabulary_size)
        self.collator = SpanPairCollator(self.tokenizer, max_length=options.sequence_length, generator=self.generator)
        length, documents = options.sequence_length - 2, []
        for text in texts:
            ids = self.tokenizer(text.text, add_special_tokens=False, verbose=False).input_ids
            spans = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
            documents += [
                part for i in range(0, len(spans), options.spans) if len(part := spans[i : i + options.spans]) > 1
            ]
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(options.seed)).tolist()
        held_out = min(HELD_OUT, len(documents) // 5)
        self.held_out, self.documents = ([documents[i] for i in part] for part in (order[:held_out], order[held_out:]))
        if not self.held_out:
            raise SystemExit(f"--text: expected at least 5 documents of two spans of {length} tokens")
        self.rows, self.sources = token_rows(texts, self.tokenizer, options.sequence_length)
        self.model = self.make_model()

    def encoder(self) -> BertForMaskedLM:
        """No dropout: a few passes over the text do not wear it out. Initial weights are larger than the default 0.02,
        which is meant for a width of 768."""
        options = self.options
        config = BertConfig(
            vocab_size=len(self.tokenizer), pad_token_id=self.tokenizer.pad_token_id, hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size, num_hidden_layers=options.layers,
            num_attention_heads=options.heads, max_position_embeddings=options.sequence_length,
            initializer_range=0.06, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return huggingface.apply(BertForMaskedLM(config))

    def make_model(self) -> nn.Module:
        options = self.options
        cls = CoCondenserForPreTraining if options.contrastive else CondenserForPreTraining
        return cls(self.encoder(), n_head_layers=options.head_layers, skip_from=options.skip_from, late_mlm=True)

    def batch(self) -> dict[str, Tensor]:
        """Pairs of spans; to Condenser they are rows like others."""
        number = max(2, self.options.batch_size // 2)
        chosen = torch.randint(len(self.documents), (number,), generator=self.generator).tolist()
        return self.on_device(self.collator([self.documents[i] for i in chosen]))

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        batch = self.batch()
        output: CondenserOutput = self.model(**batch)
        assert output.loss is not None
        weights = dict.fromkeys(("head_loss", "late_loss"), ranks.weight((batch["labels"] != IGNORE_INDEX).sum()))
        weights["contrastive_loss"] = 1 / ranks.number()  # counts once a rank
        return output.loss, {name: weight * output[name].item() for name, weight in weights.items() if name in output}

    def backward(self) -> dict[str, float]:
        if not (self.options.contrastive and self.options.chunk_size):
            return super().backward()
        assert isinstance(self.model, CoCondenserForPreTraining)
        self.optimizer.zero_grad()
        losses = cached_backward(
            self.model.encoded, self.model.contrastive_loss, self.batch(), chunk_size=self.options.chunk_size
        )
        mlm = 0.0 if losses.chunk_loss is None else losses.chunk_loss.item()
        return {"masked_loss": mlm, "contrastive_loss": losses.embedding_loss.item() / ranks.number()}

    def base_model(self) -> Any:
        return self.model.model.base_model

    @torch.no_grad()
    def recall(self) -> dict[str, float]:
        """Of held-out documents: how often the second span is among the k nearest to the first."""
        self.model.eval()
        around = [[self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]]
        cls = []
        for which in (0, 1):
            rows = torch.tensor([around[0] + spans[which] + around[1] for spans in self.held_out])
            parts, encoder = rows.to(self.options.device).split(64), self.base_model()
            cls.append(torch.cat([encoder(input_ids=part).last_hidden_state[:, 0] for part in parts]).cpu())
        self.model.train()
        scores = cls[0] @ cls[1].T
        rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
        return {f"recall@{k}": (rank < k).double().mean().item() for k in (1, 10)}


class Plain(EqualCost, Pretraining):
    """The encoder alone."""

    def make_model(self) -> BertForMaskedLM:
        return self.encoder()

    def base_model(self) -> Any:
        return self.model.base_model


def main(arguments: list[str] | None = None) -> Pretraining:
    options, console = parse(arguments), Console()
    training = Pretraining(options)
    shown = lambda found: ", ".join(f"{name} {value:.3f}" for name, value in found.items())  # noqa: E731
    if not training.history:
        console.print(f"before: {shown(training.recall())} of {len(training.held_out)} documents")
    training.run(console)
    ranks.leave_to_the_first()
    folder = options.output / "condenser"
    training.model.save_pretrained(folder)
    training.tokenizer.save_pretrained(folder)
    write_history(training.history, options.output)
    report(training, console)
    entropy = unigram_entropy(training.rows[:, 1:-1])
    console.print(f"how often each token occurs alone gives a masked loss of {entropy:.2f}")
    console.print(f"after: {shown(training.recall())} of {len(training.held_out)} documents")
    masked = [name for name in training.history[0] if name != "contrastive_loss"]
    panels = {"masked loss": masked} | ({"contrastive loss": ["contrastive_loss"]} if options.contrastive else {})
    if not plot(training.history, panels, options.output / "history.png", {"masked loss": entropy}):
        console.print("no plot: pip install matplotlib")
    if options.probe:
        plain = Plain.beside(training, console)
        console.print(f"after: {shown(plain.recall())}")
        torch.manual_seed(options.seed)
        encoders = {
            "Condenser": training.base_model(),
            "masked language model": plain.base_model(),
            "random": training.encoder().base_model,
        }
        compare(encoders, *labelled_rows(training.rows, training.sources, CLASSES), console)
    return training


if __name__ == "__main__":
    main()
