"""The processes of ``make gpu``: what each measures or tests, and in which order."""

import re
from pathlib import Path

import gpu_plan
import gpu_stages
import pytest
from gpu_stages import Command, Visit

from repdeg_fast.bench.suite import suites

THERE = {
    "linear_cross_entropy": {"cases": ["a", "b"], "sweeps": ["s"], "own": ["eager", "ours"], "peers": ["liger", "cce"]},
    "cosreg": {"cases": ["c"], "sweeps": [], "own": ["ours"], "peers": []},
    "training_step": {"cases": ["d"], "sweeps": [], "own": ["ours"], "peers": []},
    "pairwise": {"cases": ["e"], "sweeps": ["t"], "own": ["ours"], "peers": ["torchmetrics"]},
    "admin_norm": {"cases": ["f"], "sweeps": [], "own": ["ours"], "peers": ["liger"]},
}


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(gpu_stages, "plan", lambda visit: THERE)


def option(command, name):
    return command.words[command.words.index(name) + 1]


def test_the_headline_is_first_ours_before_the_peers_each_in_a_process_of_its_own(there):
    measured = [(option(c, "--ops"), option(c, "--providers")) for c in gpu_stages.commands("headline", Visit("GPU"))]
    assert measured == [
        ("linear_cross_entropy", "eager,ours"),
        ("admin_norm", "ours"),
        ("cosreg", "ours"),
        ("linear_cross_entropy", "liger"),
        ("linear_cross_entropy", "cce"),
        ("admin_norm", "liger"),
    ]
    *rest, overhead = gpu_stages.commands("bench", Visit("GPU"))
    assert [(option(c, "--ops"), option(c, "--providers"), option(c, "--cases")) for c in rest] == [
        ("pairwise", "ours", "e"),
        ("pairwise", "torchmetrics", "e"),
        ("training_step", "ours", "d"),
        ("linear_cross_entropy", "eager,ours,liger,cce", "s"),
        ("pairwise", "ours,torchmetrics", "t"),
    ]
    assert "--overhead" in overhead.words


def test_figures_of_each_process_are_in_a_file_of_their_stage(there):
    for stage in gpu_stages.MEASURING:
        words = [word for command in gpu_stages.commands(stage, Visit("GPU")) for word in command.words]
        files = [Path(word).name for word in words if word.startswith("--json=")]
        assert len(set(files)) == len(files) >= 5
        assert all(f"-{stage}-" in name for name in files)


def test_what_is_measured_is_compiled_before_and_leaves_no_figures(there):
    compiled = gpu_stages.commands("compile", Visit("GPU"))
    measured = [c for stage in gpu_stages.MEASURING for c in gpu_stages.commands(stage, Visit("GPU"))]
    assert len(compiled) == len(measured)
    assert not any("--json" in word or "--plot" in word for command in compiled for word in command.words)
    assert gpu_stages.STAGES["compile"].together


def test_large_tensors_are_tested_alone_at_the_end(monkeypatch):
    monkeypatch.setattr(gpu_stages, "_workers", lambda: ["-n", "auto"])
    _, tests, large = (command.words for command in gpu_stages.commands("check", Visit("GPU")))
    assert (option(Command(tests), "-m"), option(Command(large), "-m")) == ("pytest", "pytest")
    assert "gpu and not large" in tests
    assert "-n" in tests
    assert "gpu and large" in large
    assert "-n" not in large


def test_each_wheel_is_installed_on_its_own(tmp_path):
    for name in ("b.whl", "a.whl", "notes.txt"):
        (tmp_path / name).touch()
    commands = gpu_stages.commands("peers", Visit("GPU", wheels=tmp_path))
    assert [Path(command.words[-1]).name for command in commands] == ["a.whl", "b.whl"]
    assert all("--no-index" in command.words and "--no-deps" in command.words for command in commands)


def test_a_plan_names_every_provider_once(monkeypatch):
    monkeypatch.setattr(gpu_plan, "is_installed", lambda package: package == "liger-kernel")
    for op, suite in suites().items():
        plan = gpu_plan.plan(suite, "cuda")
        assert sorted([*plan["own"], *plan["peers"]]) == sorted(provider.name for provider in suite.providers)
        assert plan["peers"] == (["liger"] if op in ("linear_cross_entropy", "admin_norm") else [])
        assert plan["cases"] or plan["sweeps"]
    assert gpu_plan.plan(suites()["cosreg"], "cuda")["sweeps"][0] == "sweep-4096"


def test_the_sanitizer_is_given_a_test_of_every_operation():
    commands = [command.words for command in gpu_stages.commands("sanitize", Visit("GPU"))]
    assert [command[command.index("--tool") + 1] for command in commands] == ["memcheck", "racecheck"]
    files = [Path(word) for word in commands[0] if word.endswith(".py")]
    assert len(files) == len(gpu_stages.HEADLINE)
    for file in files:
        tests = re.findall(r"^def (test_\w+)", file.read_text(), re.M)
        assert any(word in name for word in gpu_stages.SANITIZED.split(" or ") for name in tests)
