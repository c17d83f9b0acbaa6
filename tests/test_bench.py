"""The benchmark framework: cases and providers by name, counted work and memory, checked values, report and plots."""

import dataclasses
import io
import json

import pytest
import safetensors.torch
import torch

from repdeg_fast.analysis import inspection, weights
from repdeg_fast.bench import measure, memory, plots, report, runner
from repdeg_fast.bench.suite import FORWARD, FORWARD_BACKWARD, Case, InputError, Provider, select, suites

CPU = torch.device("cpu")
SUITE = suites()["cosreg"]
TINY = Case("tiny", {"N": 300, "d": 24})
KEYS = {
    *("op", "case", "provider", "pass", "device", "dtype", "ms_median", "ms_p20", "ms_p80", "bytes", "flops"),
    *("timing", "host_us", "floor"),
    *("percent_of_roof", "peak_bytes", "saved_bytes", "speedup_vs_eager", "times_floor", "versions", "value", "reason"),
}


def run(case=TINY, providers=("eager", "ours-cpu", "ours-graph-free"), suite=SUITE):
    chosen = [provider for provider in suite.providers if provider.name in providers]
    (rows,) = runner.run(suite, [case], chosen, CPU, seconds=0)
    return rows


@pytest.fixture(scope="module")
def rows():
    names = ("literal", "eager", "compile", "ours-reference", "ours-cpu", "ours-cuda", "ours-graph-free")
    return run(providers=names)


def test_rows_have_the_documented_keys_and_survive_json(rows, tmp_path):
    report.write_json(rows, tmp_path / "deep" / "rows.json")
    read = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert all(set(row) == KEYS for row in read)
    assert {row["pass"] for row in read} == {FORWARD, FORWARD_BACKWARD}
    measured = [row for row in read if row["reason"] is None]
    assert all(0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] for row in measured)
    assert all(row["speedup_vs_eager"] == 1 for row in measured if row["provider"] == "eager")
    assert "THP_MEM_ALLOC_ENABLE" in read[0]["versions"]


def test_every_provider_agrees_with_the_float64_double_sum(rows):
    unit = torch.nn.functional.normalize(SUITE.make_inputs(TINY, CPU)["weight"].detach().double(), dim=1)
    similarity = unit @ unit.T
    literal = float((similarity.sum() - similarity.trace()) / len(unit) ** 2)
    measured = [row for row in rows if row.samples]
    assert len({row.provider.name for row in measured}) == 6
    for row in measured:
        assert row.exact == pytest.approx(literal, rel=1e-12)
        assert row.value == pytest.approx(literal, rel=1e-5)
        assert not row.wrong


def test_a_backend_that_cannot_serve_is_a_row_with_its_reason(rows):
    left_out = [row for row in rows if row.provider.name == "ours-cuda"]
    assert [row.reason for row in left_out] == ["serves cuda tensors only"] * 2
    assert left_out[0].as_json()["ms_median"] is None


def test_saved_bytes_of_ours_are_one_value_a_row_and_a_column(rows):
    saved = {row.provider.name: row.saved_bytes for row in rows}
    assert 0 < saved["ours-cpu"] <= 4 * (300 + 24)
    assert saved["eager"] >= 4 * 300 * 24


def test_peak_of_ours_is_the_gradient_and_little_else(rows):
    peak = {row.provider.name: row.peak_bytes for row in rows if row.pass_ == FORWARD_BACKWARD}
    gradient = 4 * 300 * 24
    assert peak["eager"] > peak["ours-cpu"] >= gradient
    assert peak["ours-graph-free"] < gradient


def test_memory_sees_what_a_pass_allocates_at_once():
    case = Case("known", {"N": 1, "d": 250_000})
    held_at_once = Provider("twice", lambda inputs: lambda: ((inputs["weight"] + 1) * 2).sum(), passes=(FORWARD,))
    inputs = SUITE.make_inputs(case, CPU)
    step = measure.Step(held_at_once, held_at_once.prepare(inputs), inputs, FORWARD)
    timeline = memory.record(step, CPU)
    assert timeline.peak() == pytest.approx(2e6, rel=0.01)
    assert timeline.points[-1][1] == 0
    assert list(timeline.phases) == ["forward"]


def test_the_scale_of_timelines_holds_all_peaks(tmp_path, monkeypatch):
    plt = plots.pyplot()
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    of_peak = {name: memory.Timeline([(1.0, peak)], {"forward": (0.0, 2.0)}) for name, peak in (("a", 10), ("b", 90))}
    plots.plot_timelines(of_peak, "title", tmp_path / "timeline.png")
    assert [axis.get_ylim() for axis in drawn[0].axes] == [(0, pytest.approx(94.5e-6))] * 2
    monkeypatch.undo()
    plt.close(drawn[0])


def test_saved_bytes_count_a_storage_once_and_inputs_never():
    x = torch.randn(1000, requires_grad=True)

    def call():
        y = x.exp()  # saved twice: by exp and by the product; x itself is an input
        return (y * x).sum()

    assert memory.saved_bytes(call, {"x": x}) == 4000


def test_work_and_saved_bytes_are_linear_in_the_sweep():
    sweep = [case for case in SUITE.cases if case.group == "sweep"]
    sizes = [SUITE.size(case) for case in sweep]
    assert sizes[-1] == 64 * sizes[0]
    for pass_ in (FORWARD, FORWARD_BACKWARD):
        counted = [SUITE.work(case, pass_, False) for case in sweep]
        assert counted[-1].flops == 64 * counted[0].flops
        assert counted[-1].bytes == pytest.approx(64 * counted[0].bytes, rel=0.01)
    call = next(provider for provider in SUITE.providers if provider.name == "ours-cpu").prepare
    for case in sweep[:2]:
        inputs = SUITE.make_inputs(case, CPU)
        assert memory.saved_bytes(call(inputs), inputs) <= 4 * sum(case.sizes.values())


def test_a_wrong_value_is_flagged(capsys):
    off = Provider("off", lambda inputs: lambda: inputs["weight"].sum() * 0 + 1)
    suite = dataclasses.replace(SUITE, providers=[*SUITE.providers, off])
    rows = run(providers=("ours-cpu", "off"), suite=suite)
    assert {row.provider.name for row in rows if row.wrong} == {"off"}
    report.print_notes(report.Console(width=200), rows)
    assert "WRONG VALUE" in capsys.readouterr().out


def test_nan_is_wrong():
    nan = Provider("nan", lambda inputs: lambda: inputs["weight"].sum() * float("nan"))
    assert all(row.wrong for row in run(providers=("nan",), suite=dataclasses.replace(SUITE, providers=[nan])))


def test_a_provider_that_raises_does_not_end_the_run():
    def prepare(inputs):
        raise RuntimeError("no such kernel\nwith details")

    broken = Provider("broken", prepare)
    suite = dataclasses.replace(SUITE, providers=[*SUITE.providers, broken])
    rows = run(providers=("eager", "broken"), suite=suite)
    assert [row.reason for row in rows if row.failed] == ["failed: RuntimeError: no such kernel"] * 2
    assert all(row.samples for row in rows if row.provider.name == "eager")


def test_every_step_of_the_progress_is_reported():
    providers = [provider for provider in SUITE.providers if provider.name in ("eager", "ours-cpu", "ours-cuda")]
    reported = []
    list(runner.run(SUITE, [TINY], providers, CPU, 0, lambda text, steps=1: reported.append((text, steps))))
    assert reported[0] == ("measuring the roof", 0)
    assert sum(steps for _, steps in reported) == runner.count_ticks([TINY], providers)


def test_the_literal_formula_is_left_out_where_it_does_not_fit():
    huge = Case("huge", {"N": 10_000_000, "d": 1})
    literal = next(provider for provider in SUITE.providers if provider.name == "literal")
    assert "GB are free" in measure.unfit(literal, huge, {}, CPU)
    assert "sweep" in measure.unfit(literal, dataclasses.replace(TINY, group="sweep"), {}, CPU)


def test_names_choose_cases_groups_and_providers():
    (chosen,) = select(["cosreg"], ["sweep", "bert-base"], ["eager"], CPU)
    assert chosen.cases[0].name == "bert-base"
    assert {case.group for case in chosen.cases[1:]} == {"sweep"}
    assert [provider.name for provider in chosen.providers] == ["eager"]
    (default,) = select(["cosreg"], [], [], CPU)
    assert "gemma" not in [case.name for case in default.cases]


def test_an_operation_without_a_case_here_takes_one_of_the_callers():
    with pytest.raises(InputError, match="no chosen operation has both"):
        select(["training_step"], [], [], CPU)
    (chosen,) = select(["training_step"], [], [], CPU, one_more=True)
    assert chosen.cases == []
    assert "training_step" not in [s.suite.op for s in select([], [], [], CPU, one_more=True)]


@pytest.mark.parametrize(
    ("ops", "cases", "providers", "names"),
    [
        (["cosine"], [], [], ["ops", "'cosine'", "cosreg"]),
        ([], ["bert"], [], ["cases", "'bert'", "bert-base", "sweep"]),
        ([], [], ["our"], ["providers", "'our'", "ours-cpu", "literal"]),
    ],
)
def test_unknown_names_list_what_there_is(ops, cases, providers, names):
    with pytest.raises(InputError) as error:
        select(ops, cases, providers, CPU)
    assert all(name in str(error.value) for name in names)


def test_an_unavailable_case_says_why():
    suite = suites()["cosreg"]
    missing = dataclasses.replace(TINY, unavailable="its package is not installed")
    suites()["cosreg"] = dataclasses.replace(suite, cases=[missing])
    try:
        with pytest.raises(InputError, match="its package is not installed"):
            select(["cosreg"], ["tiny"], [], CPU)
    finally:
        suites()["cosreg"] = suite


def test_interleaved_ratios_cancel_a_slow_spell():
    assert measure.speedup([4.0, 40.0, 4.0], [2.0, 20.0, 2.0, 9.0, 9.0], CPU) == 2


def test_roof_percent_is_bound_by_the_larger_share():
    roof = measure.Roof(copy=1e9, gemm=1e12)
    assert roof.percent(measure.Work(bytes=10**6, flops=10**6), ms=2.0) == pytest.approx(50)
    assert roof.percent(measure.Work(bytes=1, flops=10**9), ms=4.0) == pytest.approx(25)


def test_plots_are_written(rows, tmp_path):
    sweep = [row for n in (64, 256) for row in run(Case(f"s{n}", {"N": n, "d": 8}, group="sweep"))]
    written = plots.plot_run([*rows, *sweep], tmp_path)
    assert {path.name for path in written} == {"cosreg-time.png", "cosreg-memory.png", "cosreg-sweep.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_tables_hold_every_provider(rows):
    console = report.Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(rows))
    text = console.export_text()
    assert all(row.provider.name in text for row in rows)
    assert f"{rows[0].exact:.12f}" in text
    assert "forward+backward: ours-graph-free is " in text


def test_minilm_is_a_case_with_its_known_value():
    if weights.minilm_checkpoint() is None:
        pytest.skip(f"{weights.MINILM_PACKAGE} is not installed")
    case = next(case for case in SUITE.cases if case.name == "minilm")
    inputs = SUITE.make_inputs(case, CPU)
    assert tuple(inputs["weight"].shape) == (30522, 384)
    assert f"{float(SUITE.exact(inputs)):.12f}" == "0.018061430581"


def test_inspection_against_plain_svd():
    weight = torch.randn(500, 12) + 0.5
    weight[7] = 0
    found = inspection.inspect_embedding(weight)
    double = weight.double()
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(double))
    torch.testing.assert_close(found.centred_singular_values, torch.linalg.svdvals(double - double.mean(0)))
    unit = torch.nn.functional.normalize(double, dim=1)
    off_diagonal = float((unit @ unit.T).sum()) - 499
    assert found.cosreg == pytest.approx(off_diagonal / 500**2, rel=1e-12)
    assert found.mean_cosine == pytest.approx(off_diagonal / (499 * 498), rel=1e-12)
    assert found.zero_rows == 1
    torch.testing.assert_close(found.norms, double.norm(dim=1))


def test_inspection_names_rows_that_are_not_finite():
    weight = torch.randn(10, 4)
    weight[3, 1] = float("nan")
    with pytest.raises(InputError, match="first: row 3"):
        inspection.inspect_embedding(weight)


def test_a_tensor_is_found_at_any_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain.pt", "with:colon.pt"):
        torch.save({"a:b": torch.randn(3, 2)}, name)
        for wanted in (None, "a:b"):
            path, found = weights.parse(f"{name}:{wanted}" if wanted else name)
            assert (str(path), found) == (name, wanted)
            assert weights.load(path, found)[0] == "a:b"


def test_safetensors_are_known_by_their_content(tmp_path):
    path = tmp_path / "no_suffix"
    safetensors.torch.save_file({"only": torch.randn(3, 2)}, str(path))
    assert weights.load(path)[0] == "only"


def test_a_dict_that_holds_itself_is_read_once(tmp_path):
    shared = {"weight": torch.randn(3, 2)}
    content = {"model": shared, "ema": shared}
    content["self"] = content
    torch.save(content, tmp_path / "loop.pt")
    assert weights.load(tmp_path / "loop.pt", "ema.weight")[0] == "ema.weight"


def test_the_index_of_a_sharded_checkpoint_is_explained(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="name the shard FILE"):
        weights.load(path)
