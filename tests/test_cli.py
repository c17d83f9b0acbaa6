"""The command line: what it prints and writes, and what it says to bad input."""

import io
import json
import re
import types

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import repdeg_fast
from repdeg_fast.analysis import weights
from repdeg_fast.bench.suite import select
from repdeg_fast.cli.app import app

QUICK = ["--providers", "eager,ours-cpu,ours-triton,ours-graph-free", "--seconds", "0"]


def invoke(*arguments, code=0, **env):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", **env})
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())  # as if it were one line


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "bert.embeddings.word_embeddings.weight": torch.randn(200, 16) + 0.3,
        "bert.encoder.weight": torch.randn(400, 16),
        "bert.bias": torch.randn(16),
        "bert.position_ids": torch.arange(12).reshape(3, 4),
    }
    save_file(tensors, str(path))
    return path


@pytest.fixture
def torch_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": {"head.weight": torch.randn(50, 8), "wte.weight": torch.randn(40, 8)}, "step": 3}, path)
    return path


def test_help_names_commands_operations_cases_and_providers():
    assert all(command in invoke("--help") for command in ("bench", "profile", "inspect", "info"))
    assert all(name in invoke("bench", "--help") for name in ("cosreg", "--list", "--weights"))
    output = CliRunner().invoke(app, ["bench", "--list"], env={"COLUMNS": "80"}).output
    assert all(name in output for name in ("cosreg", "bert-base", "sweep", "ours-cpu", "cut-cross-entropy"))
    assert max(map(len, output.splitlines())) <= 80


def test_bench_writes_table_json_and_plots(checkpoint, tmp_path):
    output = invoke(
        *("bench", "--device", "cpu", "--weights", checkpoint, "--json", tmp_path / "out.json"),
        *("--plot", tmp_path / "plots", *QUICK),
    )
    assert "ours-graph-free" in output
    assert "R in float64 = 0." in output
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["case"] for row in rows} == {"bert.embeddings.word_embeddings.weight"}
    assert {row["provider"] for row in rows} == set(QUICK[1].split(","))
    assert (tmp_path / "plots" / "cosreg-time.png").exists()


def test_bench_casts_to_the_named_dtype(torch_checkpoint, tmp_path):
    json_path = tmp_path / "out.json"
    invoke(
        "bench", "--device", "cpu", "--weights", torch_checkpoint, "--dtype", "bfloat16", "--json", json_path, *QUICK
    )
    rows = json.loads(json_path.read_text())
    assert {(row["case"], row["dtype"]) for row in rows} == {("model.wte.weight", "bfloat16")}


def test_bench_ends_with_an_error_where_a_value_is_wrong(checkpoint, monkeypatch):
    from repdeg_fast.bench import suite

    monkeypatch.setitem(suite.TOLERANCE, torch.float32, -1.0)
    assert "WRONG VALUE" in invoke("bench", "--device", "cpu", "--weights", checkpoint, *QUICK, code=1)


def test_profile_shows_phases_and_draws_the_timeline(checkpoint, tmp_path):
    output = invoke(
        *("profile", "--op", "cosreg", "--provider", "eager,ours-cpu,ours-cuda,ours-graph-free", "--device", "cpu"),
        *("--weights", checkpoint, "--out", tmp_path),
    )
    assert all(phase in output for phase in ("forward peak", "saved", "backward peak", "held after"))
    assert "serves cuda tensors only" in output
    assert list(tmp_path.glob("*-timeline.png"))


def test_inspect_finds_the_word_embedding(checkpoint, tmp_path):
    output = invoke("inspect", checkpoint, "--out", tmp_path / "cone.png")
    assert "bert.embeddings.word_embeddings.weight (none was named)" in output
    assert "200 × 16" in output
    assert (tmp_path / "cone.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_takes_a_named_tensor_of_a_torch_checkpoint(torch_checkpoint, tmp_path):
    output = invoke("inspect", f"{torch_checkpoint}:model.head.weight", "--out", tmp_path / "cone.png")
    assert "model.head.weight: 50 × 8" in output


def test_inspect_falls_back_to_the_largest_matrix(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"a": torch.randn(5, 3), "b": torch.randn(20, 3), "c": torch.randn(100)}, path)
    assert "tensor: b" in invoke("inspect", path, "--out", tmp_path / "cone.png")


def test_info_says_what_serves_and_why():
    output = invoke("info")
    assert all(text in output for text in ("torch", "cosreg", "served by", "Native kernels", "triton:"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_info_says_when_the_named_backend_cannot_serve():
    with repdeg_fast.use_backend("cuda"):
        assert "cuda (cannot serve: serves cuda tensors only)" in invoke("info")


def test_info_says_whether_it_is_strict(monkeypatch):
    assert "Strict (REPDEG_FAST_STRICT=1): off" in invoke("info")
    monkeypatch.setenv("REPDEG_FAST_STRICT", "1")
    assert "Strict (REPDEG_FAST_STRICT=1): on" in invoke("info")


def test_version():
    assert invoke("--version") == f"repdeg-fast {repdeg_fast.__version__}"


def test_info_build_compiles_or_says_why_not():
    output = invoke("info", "--build")
    assert "cpu kernels: compiled" in output
    assert "instruction_set" in output


class Malicious:
    def __reduce__(self):
        return print, ("a checkpoint must not run code",)


def test_a_checkpoint_cannot_run_code(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"weight": Malicious()}, path)
    output = invoke("inspect", path, code=2)
    assert "not a readable" in output
    assert "must not run code" not in output


def test_a_pickled_module_is_refused_in_plain_words(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    output = invoke("inspect", path, code=2)
    assert all(text in output for text in ("holds a torch.nn.modules.linear.Linear", "state_dict()"))
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench", "--ops", "cosine"], ["ops", "'cosine'", "cosreg"]),
        (["bench", "--cases", "bert"], ["'bert'", "bert-base", "xlm-r"]),
        (["bench", "--providers", "fastest"], ["'fastest'", "eager", "ours-triton"]),
        (["bench", "--device", "tpu"], ["device", "'tpu'", "cpu and cuda"]),
        (["bench", "--device", "cpu", "--dtype", "int8"], ["dtype", "'int8'", "bfloat16"]),
        (["bench", "--weights", "no/such/file"], ["no file", "FILE:TENSOR"]),
        (["profile", "--op", "cosreg", "--case", "tiny"], ["'tiny'", "minilm"]),
        (["inspect", "no/such/file"], ["no file"]),
        (["inspect", "tests"], ["tests is a folder", "checkpoint"]),
        (["bench", "--seconds", "nan"], ["seconds"]),
        (["bench", "--ops", ","], ["expected names with commas between them, got ','"]),
        (["bench", "--seconds", "inf"], ["seconds", "finite"]),
        (["bench", "--json", "tests"], ["json: tests is a folder"]),
        (["bench", "--json", "pyproject.toml/x.json"], ["json: pyproject.toml is a file"]),
        (["bench", "--plot", "pyproject.toml"], ["plot: pyproject.toml is a file"]),
        (["profile", "--op", "cosreg", "--out", "pyproject.toml/deep"], ["out: pyproject.toml is a file"]),
    ],
)
def test_bad_input_lists_what_there_is(arguments, expected):
    output = invoke(*arguments, code=2)
    assert all(text in output for text in expected)
    assert "Traceback" not in output


def test_bad_tensors_list_the_names(checkpoint):
    output = invoke("inspect", f"{checkpoint}:embedding", code=2)
    assert "'embedding'" in output
    assert "bert.embeddings.word_embeddings.weight [200, 16]" in output
    assert "expected (N, d)" in invoke("inspect", f"{checkpoint}:bert.bias", code=2)
    assert "torch.int64" in invoke("inspect", f"{checkpoint}:bert.position_ids", code=2)


def test_outputs_are_looked_at_before_measuring(checkpoint, tmp_path, monkeypatch):
    assert "out: " in invoke("inspect", checkpoint, "--out", tmp_path, code=2)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    for option in ("--json", "--plot"):
        assert "no permission to write" in invoke("bench", option, tmp_path / "deep" / "new", *QUICK, code=2)


def test_a_failing_write_is_no_traceback(checkpoint, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repdeg_fast.analysis.pictures.plot_cone", full)
    assert "error: [Errno 28] No space left" in invoke("inspect", checkpoint, "--out", tmp_path / "x.png", code=2)


ODD = "a[/b]$x^$:c/[bold]" + "d" * 300  # rich markup, a matplotlib formula, a path, too long for a file name


def test_odd_names_of_tensors_and_files_are_shown_as_they_are(tmp_path):
    path = tmp_path / "[red]:odd.pt"
    torch.save({ODD: torch.randn(40, 8)}, path)
    picture = tmp_path / "[bold].png"
    output = invoke("inspect", f"{path}:{ODD}", "--out", picture)
    assert "a[/b]$x^$:c/[bold]ddd" in output
    assert f"picture: {picture}" in output
    common = ("--device", "cpu", "--weights", path)
    output = invoke("bench", "--ops", "cosreg", "--plot", tmp_path, *common, *QUICK)
    assert "a[/b]$x^$:c/[bold]ddd" in output
    output = invoke("profile", "--op", "cosreg", "--provider", "eager", "--out", tmp_path, *common)
    assert "a[/b]$x^$:c/[bold]ddd" in output
    assert len(list(tmp_path.glob("cosreg-*ddd-timeline.png"))) == 1


@pytest.mark.parametrize("wide", [False, True])
def test_a_narrow_terminal_loses_no_figure(checkpoint, wide):
    arguments = ["bench", "--ops", "cosreg", "--device", "cpu", "--weights", checkpoint, *QUICK, *["--wide"] * wide]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    lines = result.output.splitlines()
    eager = next(line.split() for line in lines if line.startswith("eager"))
    assert eager[1:2] + eager[3:5] == ["fwd", "1.00×", "1.00×"]
    assert "…" not in result.output.replace("A…", "")
    if wide:
        assert re.fullmatch(r"-?0\.\d{12}", eager[-1])
        assert "TFLOP/s" in result.output
    else:
        assert eager[-1] == "ok"
        assert max(map(len, lines)) <= 80


def test_columns_are_respected_where_output_is_piped(checkpoint, tmp_path):
    for command in (["info"], ["inspect", checkpoint, "--out", tmp_path / "x.png"]):
        arguments = [str(argument) for argument in command]
        output = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).output
        assert max(len(line) for line in output.splitlines() if line[:1] in "│┃┏└") <= 80
        assert "…" not in output


def test_bench_ends_with_an_operation_a_row(checkpoint):
    arguments = ["bench", "--ops", "cosreg,admin_norm", "--device", "cpu", "--weights", checkpoint, *QUICK]
    output = invoke(*arguments, COLUMNS="80").split("How we stand against the best rival")[1]
    for op in ("cosreg", "admin_norm"):
        assert re.search(rf"{op} [\d.]+× eager [\d.]+× eager (–|[\d.,]+×) ok", output), output


def test_the_last_table_cuts_no_name(monkeypatch):
    from repdeg_fast.bench import report

    row = types.SimpleNamespace(suite=types.SimpleNamespace(op="mlm_losses_and_sample"), case=None, pass_="forward")
    row.provider = types.SimpleNamespace(ours=True, rival=False, graph_free=False)
    row.samples, row.error, row.wrong, row.failed = [], 0.0, False, False
    monkeypatch.setattr(report, "_against_rival", lambda rows: (2.7, "compile-mixed-first"))
    console = report.Console(width=80, record=True, file=io.StringIO())
    console.print(report.summary([row]))
    text = console.export_text()
    assert "mlm_losses_and_sample " in text
    assert text.count("compile-mixed-first") == 2


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_any_encoding_of_the_terminal_will_do(checkpoint, tmp_path, monkeypatch, encoding):
    from repdeg_fast import cli

    common = ["--device", "cpu", "--weights", str(checkpoint), "--ops", "cosreg,admin_norm", *QUICK]
    for arguments in (["bench", *common], ["inspect", str(checkpoint), "--out", str(tmp_path / "x.png")], ["--help"]):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr("sys.argv", ["repdeg-fast", *arguments])
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            cli.main()
        streams[0].flush()
        assert end.value.code == 0
        assert streams[0].buffer.getvalue().decode(encoding)


def test_a_wrong_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setattr("repdeg_fast.backends.requested", lambda: "mkl")
    assert "error: REPDEG_FAST_BACKEND: expected one of reference" in invoke("info", code=2)


def test_one_row_is_no_wrong_value(tmp_path):
    torch.save({"weight": torch.randn(1, 8)}, tmp_path / "row.pt")
    torch.save({"weight": torch.eye(8)}, tmp_path / "orthogonal.pt")
    providers = ["--providers", "eager,ours-cpu,ours-streaming-cpu", "--seconds", "0"]
    for name in ("row.pt", "orthogonal.pt"):
        output = invoke("bench", "--device", "cpu", "--weights", tmp_path / name, *providers)
        assert "linear_cross_entropy" in output
        assert "WRONG" not in output


def test_one_case_an_operation_unless_asked_for_more():
    cpu = torch.device("cpu")
    brief, full = (select([], [], [], cpu, full=full) for full in (False, True))
    assert all(len(selection.cases) == 1 for selection in brief)
    assert {"cosreg", "admin_norm", "linear_cross_entropy", "gumbel_mix", "mlm_losses_and_sample"} <= {
        selection.suite.op for selection in brief
    }
    assert sum(len(selection.cases) for selection in full) > len(brief)
    of_gumbel = [next(s for s in chosen if s.suite.op == "gumbel_mix").providers for chosen in (brief, full)]
    assert [p.name for p in of_gumbel[1] if p not in of_gumbel[0]] == ["compile"]
    (named,) = select(["admin_encoder"], [], [], cpu, full=False)  # which has no brief one
    assert [case.name for case in named.cases] == ["6-layer"]
    (named,) = select(["cosreg"], ["literal-8192"], [], cpu, full=False)
    assert [case.name for case in named.cases] == ["literal-8192"]


def test_tensors_without_plain_values_are_named(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"sparse": torch.eye(4).to_sparse(), "meta": torch.empty(3, 3, device="meta")}, path)
    assert all(text in invoke("inspect", f"{path}:sparse", code=2) for text in ("sparse in", "save its to_dense()"))
    assert "meta in" in invoke("inspect", f"{path}:meta", code=2)


@pytest.mark.parametrize("command", [["inspect"], ["bench", "--weights"], ["profile", "--op", "cosreg", "--weights"]])
def test_values_that_are_not_finite_are_counted(tmp_path, command):
    weight = torch.randn(9000, 4)
    weight[8000, 1:] = float("nan")
    torch.save({"weight": weight}, tmp_path / "nan.pt")
    output = invoke(*command, tmp_path / "nan.pt", code=2)
    assert "3 non-finite values" in output
    assert "1 of 9000 rows (first: row 8000)" in output


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not a checkpoint at all", "it is a text file, which starts with 'not a checkpoint at all'"),
        ("ein längerer Text, mehr als gelesen wird: ä".encode() * 40, "it is a text file"),
        (b"", "it is empty"),
        (bytes(range(256)), "not a readable"),
        (b"PK\x03\x04 cut off", "not a readable"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, suffix, content, expected):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    for command in (["bench", "--weights"], ["inspect"]):
        output = invoke(*command, path, code=2)
        assert f"broken.{suffix}" in output
        assert expected in output


def test_what_is_larger_than_memory_is_called_so(checkpoint, torch_checkpoint, tmp_path, monkeypatch):
    old = tmp_path / "old.pt"
    torch.save({"weight": torch.randn(9, 3)}, old, _use_new_zipfile_serialization=False)
    for module in ("analysis.weights", "bench.measure"):
        monkeypatch.setattr(f"repdeg_fast.{module}.free_bytes", lambda device: 100)
    assert "which must be read whole where it is no zip file" in invoke("inspect", old, code=2)
    assert "to measure with it takes 3 times as much" in invoke("bench", "--weights", checkpoint, code=2)
    for path in (checkpoint, torch_checkpoint):  # mapped, a part at a time
        weights.load(path)


@pytest.mark.parametrize("name", ["x.jpg", "x"])
def test_a_picture_is_not_written_under_the_name_of_another_format(checkpoint, tmp_path, name):
    assert "expected a name such as x.png" in invoke("inspect", checkpoint, "--out", tmp_path / name, code=2)
    assert not (tmp_path / name).exists()


def test_the_dots_of_a_small_embedding_are_seen(torch_checkpoint, tmp_path):
    import matplotlib.image

    invoke("inspect", torch_checkpoint, "--out", tmp_path / "x.png")  # 50 rows
    pixels = torch.from_numpy(matplotlib.image.imread(tmp_path / "x.png"))[..., :3]
    left = pixels[:, : pixels.shape[1] * 2 // 5]
    coloured = left.max(dim=2).values - left.min(dim=2).values > 0.2
    assert int(coloured.sum()) > 40 * 30  # beside the red cross and line


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(50, 8), torch.ones(50, 8), torch.randn(1, 8), torch.randn(50, 1)],
    ids=["zeros", "ones", "one row", "one column"],
)
@pytest.mark.filterwarnings("error")
def test_degenerate_embeddings_show_no_nan(tmp_path, weight, monkeypatch):
    from matplotlib.text import Text

    shown = []
    monkeypatch.setattr(
        Text, "set_text", lambda self, text, plain=Text.set_text: (shown.append(str(text)), plain(self, text))
    )
    torch.save({"weight": weight}, tmp_path / "weight.pt")
    output = invoke("inspect", tmp_path / "weight.pt", "--out", tmp_path / "x.png")
    assert not re.search(r"\bnan\b", output)
    assert any("% of the energy" in text for text in shown)
    assert not any("nan" in text for text in shown)


def test_a_checkpoint_without_matrices_says_so(tmp_path):
    path = tmp_path / "vector.safetensors"
    save_file({"only": torch.randn(3)}, str(path))
    assert "only [3]" in invoke("inspect", path, code=2)


def test_missing_matplotlib_names_the_extra(checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install 'repdeg-fast[cli]'" in invoke("inspect", checkpoint, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_a_missing_gpu_is_explained():
    assert "cuda is not there" in invoke("bench", "--device", "cuda", code=2)


@pytest.mark.gpu
def test_profile_on_a_gpu_also_writes_snapshots(checkpoint, tmp_path):
    arguments = ("--provider", "eager,ours-cuda", "--device", "cuda", "--weights", checkpoint, "--out", tmp_path)
    invoke("profile", "--op", "cosreg", *arguments)
    assert len(list(tmp_path.glob("*-snapshot.pickle"))) == 2
