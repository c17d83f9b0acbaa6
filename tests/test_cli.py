"""The command line: what it prints and writes, and what it says to bad input."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import repdeg_fast
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
    assert all(name in invoke("bench", "--help") for name in ("cosreg", "bert-base", "ours-cpu", "--weights"))


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
        (["inspect", "tests"], ["cannot read tests", "directory"]),
        (["bench", "--seconds", "nan"], ["seconds"]),
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


def test_a_narrow_terminal_loses_no_figure(checkpoint):
    arguments = ("bench", "--ops", "cosreg", "--device", "cpu", "--weights", checkpoint, *QUICK)
    output = re.sub(r"\x1b\[[0-9;]*m", "", invoke(*arguments, COLUMNS="80", FORCE_COLOR="1"))
    eager = next(line for line in output.split("│ eager")[1:]).split("│")
    assert "1.00×" in [cell.strip() for cell in eager]
    assert re.search(r"│ +-?0\.\d{12} +│", output)


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


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_unreadable_checkpoints_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"not a checkpoint at all")
    output = invoke("bench", "--weights", path, code=2)
    assert name in output
    assert "not a readable" in output


def test_a_checkpoint_without_matrices_says_so(tmp_path):
    path = tmp_path / "vector.safetensors"
    save_file({"only": torch.randn(3)}, str(path))
    assert "only [3]" in invoke("inspect", path, code=2)


def test_missing_matplotlib_names_the_extra(checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install 'repdeg-fast[bench]'" in invoke("inspect", checkpoint, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_a_missing_gpu_is_explained():
    assert "cuda is not there" in invoke("bench", "--device", "cuda", code=2)


@pytest.mark.gpu
def test_profile_on_a_gpu_also_writes_snapshots(checkpoint, tmp_path):
    arguments = ("--provider", "eager,ours-cuda", "--device", "cuda", "--weights", checkpoint, "--out", tmp_path)
    invoke("profile", "--op", "cosreg", *arguments)
    assert len(list(tmp_path.glob("*-snapshot.pickle"))) == 2
