"""The command line: what it prints and writes, and what it says to bad input."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from repdeg_fast.cli import app

QUICK = ["--providers", "eager,ours-cpu,ours-triton,ours-graph-free", "--seconds", "0"]


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
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
