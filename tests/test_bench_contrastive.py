"""The benchmark suite of the contrastive loss, on a case of a fraction of a second."""

import pytest
import torch
from torch.nn import functional as F

from repdeg_fast.bench import runner
from repdeg_fast.bench.suite import FORWARD_BACKWARD, Case, suites

CPU = torch.device("cpu")
SUITE = suites()["contrastive"]
TINY = Case("tiny", {"N": 40, "d": 24})


def test_every_provider_has_the_exact_loss():
    chosen = [provider for provider in SUITE.providers if provider.name != "compile"]
    (rows,) = runner.run(SUITE, [TINY], chosen, CPU, seconds=0)
    queries, documents = (F.normalize(x.detach().double(), dim=1) for x in SUITE.make_inputs(TINY, CPU).values())
    literal = F.cross_entropy(20 * queries @ documents.T, torch.arange(40)).item()
    checked = [row for row in rows if row.value is not None]
    assert {row.provider.name for row in checked} >= {"eager", "ours-cpu", "ours-reference"}
    for row in checked:
        assert row.exact == pytest.approx(literal, rel=1e-12)
        assert row.value == pytest.approx(literal, rel=1e-5)
        assert not row.wrong


def test_cached_peers_make_the_gradients():
    pytest.importorskip("sentence_transformers")
    inputs = SUITE.make_inputs(TINY, CPU)
    (eager,) = [provider for provider in SUITE.providers if provider.name == "eager"]
    true = torch.autograd.grad(eager.prepare(inputs)(), list(inputs.values()))
    for provider in SUITE.providers:
        if provider.name.startswith("st-cached"):
            assert provider.passes == (FORWARD_BACKWARD,)
            provider.prepare(inputs)()
            torch.testing.assert_close([x.grad for x in inputs.values()], list(true), rtol=1e-4, atol=1e-6)
            for x in inputs.values():
                x.grad = None


def test_pairs_of_weights():
    weight = torch.randn(10, 6)
    inputs = SUITE.make_inputs(SUITE.case_of_weights("file", weight), CPU)
    assert torch.equal(inputs["queries"], weight[::2])
    assert torch.equal(inputs["documents"], weight[1::2])
