"""The benchmark of a whole step of AMOS, on a model of a fraction of a second."""

import largest_batch
import pytest
import torch

from repdeg_fast.bench import runner
from repdeg_fast.bench.suite import FORWARD, FORWARD_BACKWARD, suites
from repdeg_fast.bench.suites import training_step

CPU = torch.device("cpu")
SUITE = suites()["training_step"]
TINY = training_step._case("tiny", 2, 16, 32, 6, 301)


def test_ours_has_the_loss_of_the_definition_and_both_train_the_same_parameters():
    chosen = [provider for provider in SUITE.providers if provider.name in ("eager", "ours-cpu")]
    (rows,) = runner.run(SUITE, [TINY], chosen, CPU, seconds=0)
    assert [row.reason for row in rows] == [None] * 4
    assert all(row.error < 1e-6 for row in rows if row.provider.ours)
    assert all(row.value is None for row in rows if row.provider.name == "eager")


def test_published_heads_have_the_same_losses():
    inputs = SUITE.make_inputs(TINY, CPU)
    ours, theirs = (training_step._module(inputs, published) for published in (False, True))
    words = inputs["discriminator.embeddings.word_embeddings.weight"]
    assert ours.generator.embeddings.word_embeddings.weight is words is theirs.mlm_head.weight
    losses = [model(inputs["input_ids"], labels=inputs["labels"]).mlm_losses for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    losses[1].sum().backward()
    assert words.grad is not None


def test_work_counts_the_heads():
    forward, both = (SUITE.work(TINY, pass_, False) for pass_ in (FORWARD, FORWARD_BACKWARD))
    masked, vocabulary, width = 2 * 2, 301, 32
    layers = 2 * 32 * 10 * (12 * width**2 + 2 * 16 * width)
    assert forward.flops == layers + 2 * 3 * masked * vocabulary * width
    assert both.flops == 3 * forward.flops + 2 * masked * vocabulary * width


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 100, 1000])
def test_largest_batch_is_found_to_a_sixteenth(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest_batch.largest(fits)
    assert found <= limit <= found * 17 / 16 + 1
    assert len(tried) == len({*tried}) <= 20


def test_a_batch_that_is_too_large_is_an_answer(monkeypatch):
    (provider,) = (provider for provider in SUITE.providers if provider.name == "ours-cpu")
    assert largest_batch.fits(TINY, provider, 3, CPU)
    full = torch.OutOfMemoryError("full")
    monkeypatch.setattr(largest_batch, "_two_steps", lambda *_: (_ for _ in ()).throw(full))
    assert not largest_batch.fits(TINY, provider, 3, CPU)
