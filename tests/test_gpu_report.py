"""``make gpu`` cannot run here; that it keeps to its time, and always leaves a report, can be tested."""

import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parent.parent / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


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
