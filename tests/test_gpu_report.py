"""``make gpu`` cannot run here; that it keeps to its time, and always leaves a report, can be tested."""

import io
import json
import re
import sys
import time
from pathlib import Path

import gpu
import pytest


def row(**changes):
    versions = {"torch": "2.11.0", "triton": None}
    figures = {"ms_median": 1.5, "ms_p20": 1.4, "ms_p80": 1.7, "percent_of_roof": 91.2, "peak_bytes": 2_000_000}
    names = {"op": "cosreg", "case": "gemma", "provider": "eager", "pass": "forward", "dtype": "bfloat16"}
    return {
        **names,
        **figures,
        "saved_bytes": 0,
        "speedup_vs_eager": 1.0,
        "versions": versions,
        "reason": None,
        **changes,
    }


def test_a_stage_is_stopped_at_its_limit_and_keeps_what_it_printed():
    code = """
import subprocess, sys, time
print("a figure", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])  # must not outlive the stage
"""
    log, start = io.StringIO(), time.monotonic()
    assert gpu.run_limited([sys.executable, "-c", code], log, 2) == "stopped at its time limit"
    assert time.monotonic() - start < 10
    assert log.getvalue() == "a figure\n"


def test_output_that_is_held_open_holds_nobody_up():
    code = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"], start_new_session=True)
print("a figure", flush=True)
"""
    log, start = io.StringIO(), time.monotonic()
    assert gpu.run_limited([sys.executable, "-c", code], log, 15) == "passed"
    assert time.monotonic() - start < 10
    assert log.getvalue() == "a figure\n"


def test_what_was_installed_is_run_and_not_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    monkeypatch.chdir(gpu.ROOT)
    (tmp_path / "repdeg_fast").mkdir()
    (tmp_path / "repdeg_fast" / "__main__.py").write_text("print('installed')")
    log = io.StringIO()
    assert gpu.run_limited([sys.executable, "-m", "repdeg_fast"], log, 30) == "passed"
    assert log.getvalue() == "installed\n"


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A run whose stages are Python one-liners: a dictionary to put them into."""
    codes = dict.fromkeys(("install", "check", "bench", "tune", "profile"), "pass")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu, "gpu_name", lambda: "GPU")
    monkeypatch.setattr(gpu, "commands", lambda stage, name: [[sys.executable, "-c", codes[stage]]])
    return codes


def report(stages):
    return (gpu.RESULTS / "GPU.md").read_text()


def test_all_stages_in_turn(stages):
    assert gpu.run("all", time.monotonic() + 60) == 0
    named = [line.split(":")[0].removeprefix("- ") for line in report(stages).splitlines() if "passed" in line]
    assert named == ["install", "check", "bench", "tune", "profile"]


@pytest.mark.parametrize("stage", ["check", "bench", "tune", "profile"])
def test_one_stage_alone(stages, stage):
    assert gpu.run(stage, time.monotonic() + 60) == 0
    assert [line for line in report(stages).splitlines() if "passed" in line][1].startswith(f"- {stage}: passed")


def test_a_stage_that_dies_leaves_a_report_and_the_others_run(stages):
    stages["bench"] = "import os; os.kill(os.getpid(), 9)"
    assert gpu.run("all", time.monotonic() + 60) == 1
    assert "- bench: failed (exit -9)" in report(stages)
    assert "- profile: passed" in report(stages)


def test_where_pip_fails_the_package_is_laid_out_as_it_would_be(stages):
    stages["install"] = "1/0"
    stages["check"] = "import repdeg_fast.triton_kernels; assert 'site' in repdeg_fast.__file__"
    assert gpu.run("all", time.monotonic() + 120) == 0
    assert "- install: passed by copying the sources, since pip failed (exit 1)" in report(stages)
    package = gpu.SITE / "repdeg_fast"
    assert (package / "csrc" / "registration.cpp").exists()
    assert (package / "triton_kernels" / "cosreg.py").exists()


def test_stages_that_hang_end_in_time(stages):
    for stage in ("check", "bench", "tune", "profile"):
        stages[stage] = "import time; time.sleep(60)"
    start = time.monotonic()
    assert gpu.run("all", start + 8) == 1
    assert time.monotonic() - start < 20
    assert report(stages).count("stopped at its time limit") == 4


def test_an_interrupted_run_leaves_a_report_and_no_figures_of_an_earlier_one(stages, monkeypatch):
    gpu.RESULTS.mkdir()
    (gpu.RESULTS / "GPU.json").write_text(json.dumps([row()]))

    def interrupted(stage, name):
        if stage == "bench":
            raise KeyboardInterrupt
        return [[sys.executable, "-c", "pass"]]

    monkeypatch.setattr(gpu, "commands", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run("all", time.monotonic() + 60)
    assert "- bench: interrupted" in report(stages)
    assert "eager" not in report(stages)


def test_figures_that_were_cut_short_do_not_stop_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    (tmp_path / "GPU.json").write_text('[{"op": "cos')
    gpu.write_report("GPU", {"bench": "stopped at its time limit after 9 s"})
    assert "stopped at its time limit" in (tmp_path / "GPU.md").read_text()


@pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (3, "failed (exit 3)")])
def test_outcomes(code, outcome):
    assert gpu.run_limited([sys.executable, "-c", f"raise SystemExit({code})"], io.StringIO(), 30) == outcome


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    nothing = dict.fromkeys(("ms_median", "ms_p20", "ms_p80", "percent_of_roof", "peak_bytes", "saved_bytes"))
    rows = [row(), row(provider="literal", **nothing, speedup_vs_eager=None, reason="would not fit")]
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps(rows))
    gpu.write_report("NVIDIA_H200", {"check": "passed after 9 s", "bench": "stopped at its time limit after 200 s"})
    text = (tmp_path / "NVIDIA_H200.md").read_text()
    assert "- bench: stopped at its time limit after 200 s" in text
    assert "torch 2.11.0" in text
    assert "| eager | forward | bfloat16 | 1.5 (1.4–1.7) | 91 | 2 | 0 | 1.00× |" in text
    assert "would not fit" in text


def test_report_without_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    gpu.write_report("GPU", {"check": "failed (exit 1) after 2 s"})
    assert "failed (exit 1)" in (tmp_path / "GPU.md").read_text()


def test_the_sanitizer_is_given_a_test_of_every_operation():
    commands = gpu.commands("sanitize", "GPU")
    assert [command[command.index("--tool") + 1] for command in commands] == ["memcheck", "racecheck"]
    files = [Path(word) for word in commands[0] if word.endswith(".py")]
    assert len(files) == len(gpu.OPS)
    for file in files:
        tests = re.findall(r"^def (test_\w+)", file.read_text(), re.M)
        assert any(word in name for word in gpu.SANITIZED.split(" or ") for name in tests)
