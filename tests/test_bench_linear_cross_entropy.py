"""The benchmark suite of the linear cross entropy, on a case of a fraction of a second."""

import pytest
import torch
from torch.nn import functional as F

from repdeg_fast.bench import memory, profile, report, runner
from repdeg_fast.bench.suite import FORWARD, FORWARD_BACKWARD, Case, suites

CPU = torch.device("cpu")
SUITE = suites()["linear_cross_entropy"]
TINY = Case("tiny", {"K": 3, "M": 20, "V": 301, "d": 24}, tokens=20)
QUICK = ("gemms", "eager", "torch-chunked", "quack", "ours-chunked-cpu", "ours-streaming-cpu")  # all but what compiles


def providers(names=QUICK):
    return [provider for provider in SUITE.providers if provider.name in names]


@pytest.fixture(scope="module")
def rows():
    (found,) = runner.run(SUITE, [TINY], providers(), CPU, seconds=0)
    return found


def test_every_provider_has_the_exact_loss(rows):
    inputs = SUITE.make_inputs(TINY, CPU)
    logits = inputs["hidden_states"].double() @ inputs["weight"].double().T
    literal = torch.stack([F.cross_entropy(head, inputs["target"]) for head in logits]).mean().item()
    checked = [row for row in rows if row.value is not None]
    assert {row.provider.name for row in checked} >= {"eager", "ours-chunked-cpu", "ours-streaming-cpu"}
    for row in checked:
        assert row.exact == pytest.approx(literal, rel=1e-12)
        assert row.value == pytest.approx(literal, rel=1e-5)
        assert not row.wrong


def test_exact_in_tiles(monkeypatch):
    inputs = SUITE.make_inputs(TINY, CPU)
    whole = SUITE.exact(inputs)
    monkeypatch.setattr("repdeg_fast.bench.suites.linear_cross_entropy._ROWS", 7)
    monkeypatch.setattr("repdeg_fast.bench.suites.linear_cross_entropy._COLUMNS", 100)
    torch.testing.assert_close(SUITE.exact(inputs), whole, rtol=1e-14, atol=0)


def test_the_floor_is_a_time_to_compare_with_and_no_rival(rows):
    floors = [row for row in rows if row.provider.floor]
    assert [row.pass_ for row in floors] == [FORWARD, FORWARD_BACKWARD]
    assert all(row.samples and row.times_floor == 1 and row.value is None is row.peak_bytes for row in floors)
    assert all(row.times_floor > 0 for row in rows if row.samples)
    best = min((row for row in rows if row.samples and row.provider.rival and row.pass_ == FORWARD), key=lambda r: r.ms)
    assert best.speedup_vs_rival == 1
    console = report.Console(width=250, record=True)
    console.print(report.table(rows, wide=True))
    shown = console.export_text()
    assert "time ÷" in shown
    assert "a floor: no loss" in shown
    assert "× gemms" not in shown


def test_the_floor_does_the_products_of_the_loss(monkeypatch):
    done = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append((a, b, out)) or mm(a, b, out=out))
    inputs = SUITE.make_inputs(TINY, CPU)
    hidden, weight = inputs["hidden_states"].detach().flatten(0, 1), inputs["weight"].detach()
    (gemms,) = providers(("gemms",))
    loss = gemms.prepare(inputs)()
    ((_, _, dz),) = done
    torch.testing.assert_close(dz, hidden @ weight.T)
    loss.backward()
    torch.testing.assert_close([out for _, _, out in done[1:]], [dz @ weight, dz.T @ hidden])
    assert inputs["weight"].grad is None


def test_all_heads_at_once_have_the_gradients_of_head_by_head():
    """What the peers are given differs from the eager form in nothing but its arrangement."""
    gradients = {}
    for provider in providers(("eager", "torch-chunked", "ours-chunked-cpu", "ours-streaming-cpu")):
        inputs = SUITE.make_inputs(TINY, CPU)
        if provider.unavailable(inputs):
            continue
        provider.prepare(inputs)().backward()
        gradients[provider.name] = (inputs["hidden_states"].grad, inputs["weight"].grad)
    for found in gradients.values():
        torch.testing.assert_close(found, gradients["eager"])


def test_ours_saves_the_gradients_or_one_value_a_row():
    for name, limit in (("ours-chunked-cpu", 4 * (60 + 301) * 24), ("ours-streaming-cpu", 4 * 60)):
        (provider,) = providers((name,))
        inputs = SUITE.make_inputs(TINY, CPU)
        targets = inputs["target"].nbytes
        assert 0 < memory.saved_bytes(provider.prepare(inputs), inputs) <= limit + targets


def test_work_counts_three_products():
    forward, both = (SUITE.work(TINY, pass_, False) for pass_ in (FORWARD, FORWARD_BACKWARD))
    assert forward.flops == 2 * 60 * 301 * 24
    assert both.flops == 3 * forward.flops
    assert both.bytes == 3 * forward.bytes == 3 * 4 * (60 + 301) * 24


def test_real_weights_are_a_case():
    weight = torch.randn(50, 8)
    case = SUITE.case_of_weights("mine", weight)
    assert case.sizes == {"K": 3, "M": 512, "V": 50, "d": 8}
    assert torch.equal(SUITE.make_inputs(case, CPU)["weight"], weight)


def test_profile_shows_who_keeps_logits(tmp_path):
    names = ("gemms", "eager", "ours-chunked-cpu")
    found = profile.profile_case(SUITE, TINY, providers(names), CPU, tmp_path)
    assert "a floor" in found[0].reason
    peaks = {one.provider.name: one.timeline.peak() for one in found if one.timeline}
    assert peaks["eager"] > 4 * 60 * 301
    assert peaks["ours-chunked-cpu"] < peaks["eager"]
