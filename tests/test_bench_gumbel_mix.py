"""The benchmark suite of Gumbel mixing, on a case of a fraction of a second."""

import pytest
import torch

from repdeg_fast.bench import memory, profile, report, runner
from repdeg_fast.bench.suite import FORWARD, FORWARD_BACKWARD, Case, suites
from repdeg_fast.bench.suites import gumbel_mix as suite
from repdeg_fast.reference import gumbel_mix as reference
from repdeg_fast.reference import philox

CPU = torch.device("cpu")
SUITE = suites()["gumbel_mix"]
SIZES = {"K": 3, "M": 40, "V": 301, "d": 24}
TINY = Case("tiny", SIZES, tokens=40)
QUICK = ("gemms", "eager", "ours-reference", "ours-cpu")  # all but what compiles


def providers(names=QUICK):
    return [provider for provider in SUITE.providers if provider.name in names]


@pytest.fixture(scope="module")
def rows():
    (found,) = runner.run(SUITE, [TINY], providers(), CPU, seconds=0)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_is_the_definition_in_tiles(monkeypatch, dtype):
    inputs = SUITE.make_inputs(Case("tiny", SIZES, dtype=dtype), CPU)
    mixed = reference.mix(inputs["hidden_states"], inputs["mixture_logits"]).double()
    weight = inputs["weight"].double()
    _, expected = reference.gumbel_mix(
        mixed[None], torch.zeros(40, 1), weight, None, weight, inputs["seed"], temperature=0.3, hard=True
    )
    for columns in (4096, 100):
        monkeypatch.setattr(suite, "_COLUMNS", columns)
        torch.testing.assert_close(SUITE.exact(inputs), expected, rtol=0, atol=1e-14)


def test_ours_is_held_to_the_sample_of_the_seed(rows):
    ours = [row for row in rows if row.provider.ours]
    assert {row.provider.name for row in ours} == {"ours-reference", "ours-cpu"}
    assert all(row.error == 0 and not row.wrong for row in ours)
    inputs = SUITE.make_inputs(TINY, CPU)
    other_noise = {**inputs, "seed": inputs["seed"] + 1}
    (provider,) = providers(("ours-cpu",))
    _, facts = runner.prepare(SUITE, TINY, provider, other_noise, SUITE.exact(inputs), CPU)
    assert facts["error"] > 0.1


@pytest.mark.parametrize(("within", "settled"), [(1.01, True), (0.99, False)])
def test_a_token_that_scores_as_well_within_rounding_is_right(monkeypatch, within, settled):
    inputs = SUITE.make_inputs(Case("tiny", {**SIZES, "M": 200}), CPU)
    exact = SUITE.exact(inputs)
    mixed = reference.mix(inputs["hidden_states"], inputs["mixture_logits"]).double()
    noise = philox.gumbel(inputs["seed"], range(200), range(301), dtype=torch.float64)
    (best, second), tokens = (mixed @ inputs["weight"].double().T + noise)[7].topk(2)
    monkeypatch.setitem(suite.TOLERANCE, torch.float32, within * (best - second).item())
    output = exact.float()
    assert torch.equal(output[7], inputs["weight"][tokens[0]])
    output[7] = inputs["weight"][tokens[1]]
    assert (SUITE.error(inputs, output, exact) == 0) is settled
    output[7, 3] += 1e-3  # the embedding of no token
    assert SUITE.error(inputs, output, exact) > 0
    output[9], output[11] = 0, float("nan")  # too many for near-ties
    assert not SUITE.error(inputs, output, exact) < 0.1


def test_noise_of_its_own_is_measured_but_not_compared(rows):
    eager = [row for row in rows if row.provider.name == "eager"]
    assert all(row.samples and row.saved_bytes and row.peak_bytes for row in eager)
    assert all(row.value is None is row.error and not row.wrong for row in eager)
    assert all(row.speedup_vs_eager for row in rows if row.samples)
    console = report.Console(width=250, record=True)
    console.print(report.table(rows, wide=True))
    assert console.export_text().count("not compared: draws its own noise") == 2


@pytest.mark.parametrize("form", ["_published", "_mixed_first"])
def test_the_rivals_would_agree_if_they_drew_the_same_noise(monkeypatch, form):
    """Their value and their gradients, with Philox's words in place of torch's exponential draws."""
    arguments = {name: SUITE.make_inputs(TINY, CPU) for name in ("ours", "theirs")}
    uniform = philox.uniform(arguments["ours"]["seed"], range(40), range(301), philox.GUMBEL_STREAM)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(-uniform.log()))
    value = {
        "ours": suite._ours(arguments["ours"]),
        "theirs": getattr(suite, form)(
            *(arguments["theirs"][name] for name in ("hidden_states", "mixture_logits", "weight"))
        ),
    }
    upstream = torch.randn(40, 24)
    for name in value:
        value[name].backward(upstream)
    torch.testing.assert_close(value["theirs"], value["ours"])
    for name in ("mixture_logits", "weight"):
        expected = arguments["ours"][name].grad
        assert expected.abs().max() > 1e-4  # it flows
        torch.testing.assert_close(arguments["theirs"][name].grad, expected)


def test_ours_saves_a_token_and_a_number_a_row():
    inputs = SUITE.make_inputs(TINY, CPU)
    (provider,) = providers(("ours-cpu",))
    assert 0 < memory.saved_bytes(provider.prepare(inputs), inputs) <= (8 + 4) * 40


def test_work_counts_the_logits_twice_and_the_weight_thrice():
    forward, both = (SUITE.work(TINY, pass_, False) for pass_ in (FORWARD, FORWARD_BACKWARD))
    assert both.flops == 2 * forward.flops == 4 * 40 * 301 * 24
    longer = Case("longer", {**SIZES, "V": 302})
    assert SUITE.work(longer, FORWARD, False).bytes - forward.bytes == 4 * 24
    assert SUITE.work(longer, FORWARD_BACKWARD, False).bytes - both.bytes == 3 * 4 * 24


def test_real_weights_are_a_case():
    weight = torch.randn(50, 8)
    case = SUITE.case_of_weights("mine", weight)
    assert case.sizes == {"K": 3, "M": 512, "V": 50, "d": 8}
    assert torch.equal(SUITE.make_inputs(case, CPU)["weight"], weight)


def test_profile_shows_who_keeps_logits(tmp_path):
    wide = Case("wide", {**SIZES, "V": 20_000})
    found = profile.profile_case(SUITE, wide, providers(("gemms", "eager", "ours-cpu")), CPU, tmp_path)
    assert "a floor" in found[0].reason
    timelines = {one.provider.name: one.timeline for one in found if one.timeline}
    logits = 4 * 40 * 20_000
    assert timelines["eager"].peak() > 4 * logits
    assert timelines["ours-cpu"].peak() < timelines["eager"].peak() / 2
    assert {one.provider.name: one.saved > logits for one in found[1:]} == {"eager": True, "ours-cpu": False}


def test_losses_and_sample_are_held_to_the_definition():
    joint = suites()["mlm_losses_and_sample"]
    names = ("losses-alone", "eager", "ours-separate-cpu", "ours-joint-cpu")
    chosen = [provider for provider in joint.providers if provider.name in names]
    (rows,) = runner.run(joint, [TINY], chosen, CPU, seconds=0)
    ours = [row for row in rows if row.provider.ours]
    assert {row.provider.name for row in ours} == {"ours-separate-cpu", "ours-joint-cpu"}
    assert all(row.error < 1e-6 and row.samples for row in ours)
