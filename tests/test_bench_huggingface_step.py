"""The benchmark of a masked language model's step, on models of a fraction of a second."""

import pytest
import torch

from repdeg_fast.bench import runner
from repdeg_fast.bench.suite import FORWARD, FORWARD_BACKWARD, suites
from repdeg_fast.bench.suites import huggingface_step

CPU = torch.device("cpu")
SUITE = suites()["huggingface_step"]


def tiny(family):
    return huggingface_step._case(f"{family}-tiny", 2, 12, 64, 2, 307)


@pytest.mark.parametrize("family", huggingface_step.FAMILIES)
def test_all_have_the_loss_of_the_plain_model_and_train_the_same_parameters(family):
    chosen = [p for p in SUITE.providers if p.name in ("eager", "ours-cpu", "ours-admin-norm-cpu")]
    (rows,) = runner.run(SUITE, [tiny(family)], chosen, CPU, seconds=0)
    admin = family in ("bert", "roberta", "electra")
    assert [row.reason is None for row in rows] == [True] * 4 + [admin] * 2
    assert all(row.error < 1e-6 for row in rows if row.reason is None)


def test_the_head_is_tied_to_the_embedding_that_all_providers_train():
    inputs = SUITE.make_inputs(tiny("bert"), CPU)
    words = inputs["bert.embeddings.word_embeddings.weight"]
    model = huggingface_step._module(inputs)
    assert model.get_output_embeddings().weight is words
    huggingface_step._loss(model, inputs).backward()
    assert words.grad is not None


def test_work_counts_the_head_at_masked_positions():
    forward, both = (SUITE.work(tiny("bert"), pass_, False) for pass_ in (FORWARD, FORWARD_BACKWARD))
    layers = 2 * 24 * 2 * (12 * 64**2 + 2 * 12 * 64)
    assert forward.flops == layers + 2 * round(0.15 * 24) * 307 * 64
    assert both.flops == 3 * forward.flops
