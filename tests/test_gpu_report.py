"""``make gpu`` cannot run here; that it keeps to its time, and hands over what it has whatever happens, can be seen."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import gpu_limits
import gpu_packing
import gpu_report
import gpu_session
import gpu_stages
import pytest
import torch
from gpu_stages import Command, Visit

ALL = ["check", "compile", "headline", "bench", "tune", "profile"]


def row(**changes):
    versions = {"torch": "2.11.0", "triton": None}
    figures = {"ms_median": 1.5, "ms_p20": 1.4, "ms_p80": 1.7, "percent_of_roof": 91.2, "peak_bytes": 2_000_000}
    names = {"op": "cosreg", "case": "gemma", "provider": "eager", "pass": "forward", "dtype": "bfloat16"}
    compared = {"speedup_vs_eager": 1.0, "times_floor": None, "floor": False}
    timed = {"timing": "graph, 3 sets of inputs", "host_us": 41.6}
    return {**names, **figures, **compared, **timed, "saved_bytes": 0, "versions": versions, "reason": None, **changes}


def limited(code, seconds=30.0, folder=Path()):
    log = io.StringIO()
    outcome = gpu_limits.run_limited([sys.executable, "-c", code], log, seconds, folder, os.environ)
    return outcome, log.getvalue()


class TestLimits:
    @pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (3, "failed (exit 3)")])
    def test_outcomes(self, code, outcome):
        assert limited(f"raise SystemExit({code})")[0] == outcome

    def test_a_command_is_stopped_at_its_limit_and_keeps_what_it_printed(self):
        code = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("a figure", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])  # must not outlive it
import time; time.sleep(60)
"""
        start = time.monotonic()
        assert limited(code, seconds=3) == ("stopped at its time limit", "a figure\n")
        assert time.monotonic() - start < 9

    @pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
    def test_it_is_interrupted_first_so_that_it_can_say_what_it_found(self, handler):
        """In the background of a shell, too, where interrupts are ignored."""
        before = signal.signal(signal.SIGINT, handler)
        code = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("1 failed", flush=True)
"""
        try:
            assert limited(code, seconds=3) == ("stopped at its time limit", "1 failed\n")
        finally:
            signal.signal(signal.SIGINT, before)

    def test_output_that_is_held_open_holds_nobody_up(self):
        code = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9)"], start_new_session=True)
print("a figure", flush=True)
"""
        start = time.monotonic()
        assert limited(code) == ("passed", "a figure\n")
        assert time.monotonic() - start < 8

    def test_several_at_a_time_within_one_limit(self, tmp_path):
        meet = (
            "import pathlib, time\npathlib.Path('{}').touch()\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)"
        )
        codes = [meet.format("a", "b"), meet.format("b", "a"), "raise SystemExit(4)"]
        commands = [[sys.executable, "-c", code] for code in codes]
        with open(tmp_path / "log", "w") as log:
            together = lambda seconds, *commands: gpu_limits.run_together(  # noqa: E731
                commands, log, seconds, tmp_path, os.environ, at_once=2
            )
            assert together(30, *commands[:2]) == "passed"
            assert together(30, *commands) == "failed (exit 4)"
            assert together(0.3, [sys.executable, "-c", "import time; time.sleep(60)"]) == "stopped at its time limit"


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A visit whose stages are Python one-liners: a dictionary to put them into, and the visit."""
    codes = dict.fromkeys(("install", *ALL), "pass")
    visit = Visit("GPU", results=tmp_path / "results", work=tmp_path / "work", out=tmp_path / "out")

    def commands(stage, _):
        return [Command([sys.executable, "-S", "-c", code]) for code in codes[stage].split("\n---\n")]

    monkeypatch.setattr(gpu_stages, "commands", commands)
    codes["visit"] = visit
    return codes


def run(stages, wanted=ALL, seconds=60.0):
    return gpu.run(list(wanted), stages["visit"], time.monotonic() + seconds)


def packed(stages):
    (archive,) = stages["visit"].out.iterdir()
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name).decode() for name in file.namelist()}


def write_figures(stages, stage, *rows):
    """Code that writes figures as a process of that stage does."""
    number = gpu_stages.MEASURING.index(stage)
    return f"open({str(stages['visit'].parts / f'{number}-{stage}-00.json')!r}, 'w').write({json.dumps(rows)!r})"


def test_all_stages_in_turn(stages):
    assert run(stages) == 0
    outcomes = re.findall(r"^- (\w+): passed", packed(stages)["GPU.md"], re.MULTILINE)
    assert outcomes == ["install", *ALL]
    assert [stage for stage in gpu_stages.STAGES if stage not in (*gpu_stages.FIRST, *gpu_stages.BY_NAME)] == ALL


@pytest.mark.parametrize("wanted", [["check"], ["headline", "tune"]])
def test_some_stages_alone(stages, wanted):
    assert run(stages, wanted) == 0
    assert re.findall(r"^- (\w+): passed", packed(stages)["GPU.md"], re.MULTILINE) == ["install", *wanted]


def test_what_is_made_is_outside_after_each_process(stages):
    archive = stages["visit"].out / "GPU.zip"
    stages["headline"] = write_figures(stages, "headline", row())
    look = f"import zipfile; print(zipfile.ZipFile({str(archive)!r}).read('GPU.json').decode())"
    stages["bench"] = f"{look}\n---\n1/0"
    assert run(stages) == 1
    assert '"gemma"' in packed(stages)["GPU.bench.log"]
    assert "ZeroDivisionError" in packed(stages)["GPU.bench.log"]
    assert "- bench: failed (exit 1)" in packed(stages)["GPU.md"]


def test_a_stage_that_dies_costs_itself_alone(stages):
    stages["headline"] = "import os; os.kill(os.getpid(), 9)"
    assert run(stages) == 1
    assert "- headline: failed (exit -9)" in packed(stages)["GPU.md"]
    assert "- profile: passed" in packed(stages)["GPU.md"]


def test_a_stage_whose_program_is_not_there_costs_itself_alone(stages, monkeypatch):
    commands = gpu_stages.commands
    there = lambda stage, visit: [Command(["no-such-program"])] if stage == "check" else commands(stage, visit)  # noqa: E731
    monkeypatch.setattr(gpu_stages, "commands", there)
    assert run(stages) == 1
    assert "- check: failed ([Errno 2] No such file or directory: 'no-such-program')" in packed(stages)["GPU.md"]
    assert "- compile: passed" in packed(stages)["GPU.md"]


def test_stages_that_hang_end_in_time(stages):
    for stage in ALL:
        stages[stage] = "import time; time.sleep(60)"
    start = time.monotonic()
    assert run(stages, seconds=2) == 1
    assert time.monotonic() - start < 12
    assert packed(stages)["GPU.md"].count("stopped at its time limit") == len(ALL)


def test_where_pip_fails_the_package_is_laid_out_as_it_would_be(stages):
    stages["install"] = "1/0"
    assert run(stages, ["check"]) == 0
    assert "- install: passed by copying the sources, since pip failed (exit 1)" in packed(stages)["GPU.md"]
    package = stages["visit"].site / "repdeg_fast"
    for path in ("csrc/registration.cpp", "triton_kernels/cosreg.py", "__init__.py"):
        assert (package / path).exists()


def test_what_was_installed_is_run_and_not_the_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(gpu.ROOT)
    visit = Visit("GPU", work=tmp_path)
    package = visit.site / "repdeg_fast"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text("print('installed')")
    log = io.StringIO()
    command = [sys.executable, "-m", "repdeg_fast"]
    assert gpu_limits.run_limited(command, log, 30, visit.site, visit.environment()) == "passed"
    assert log.getvalue() == "installed\n"


def test_an_interrupted_run_hands_over_what_it_has_and_no_figures_of_an_earlier_one(stages, monkeypatch):
    visit = stages["visit"]
    visit.parts.mkdir(parents=True)
    visit.results.mkdir()
    for old in (visit.parts / "0-headline-07.json", visit.results / "GPU.json"):
        old.write_text(json.dumps([row(case="earlier")]))

    def interrupted(stage, _):
        if stage == "bench":
            raise KeyboardInterrupt
        code = write_figures(stages, "headline", row(case="new")) if stage == "headline" else "pass"
        return [Command([sys.executable, "-c", code])]

    monkeypatch.setattr(gpu_stages, "commands", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(stages)
    assert "- bench: interrupted" in packed(stages)["GPU.md"]
    assert [found["case"] for found in json.loads(packed(stages)["GPU.json"])] == ["new"]


def test_figures_of_stages_that_are_not_run_stay(stages):
    stages["headline"], stages["bench"] = (write_figures(stages, s, row(case=s)) for s in ("headline", "bench"))
    for wanted in (["bench"], ["headline"], ["check"]):
        assert run(stages, wanted) == 0
    assert [found["case"] for found in json.loads(packed(stages)["GPU.json"])] == ["headline", "bench"]


def test_a_signal_from_outside_ends_all_and_leaves_the_archive(tmp_path):
    started = tmp_path / "started"
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(gpu_stages.BENCHMARKS)!r})
import gpu, gpu_stages
gpu.ROOT = pathlib.Path({str(tmp_path)!r})
hang = "import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
code = lambda stage: hang if stage == "check" else "pass"
gpu_stages.commands = lambda stage, visit: [gpu_stages.Command([sys.executable, "-c", code(stage)])]
sys.exit(gpu.main())
"""
    command = [sys.executable, "-c", code, "--dry-run", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not started.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "ended from outside" in process.communicate(timeout=10)[1]
    with zipfile.ZipFile(tmp_path / "out" / "dry-run.zip") as file:
        assert "- check: interrupted" in file.read("dry-run.md").decode()


class TestPacking:
    @pytest.fixture
    def results(self, tmp_path):
        folder = tmp_path / "results"
        (folder / "GPU").mkdir(parents=True)
        contents = {"GPU.json": "[]", "GPU.md": "# GPU", "GPU.check.log": "1 failed", "GPU/a.png": "picture"}
        for name, content in {**contents, "GPU/a-snapshot.pickle": "memory", "OTHER.json": "[]"}.items():
            (folder / name).write_text(content)
        return folder

    def test_all_of_this_gpu_but_snapshots(self, results, tmp_path):
        archive = gpu_packing.pack(results, "GPU", tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == [archive]
        with zipfile.ZipFile(archive) as file:
            assert file.namelist() == ["GPU.md", "GPU.json", "GPU.check.log", "GPU/a.png"]
            assert file.read("GPU.check.log") == b"1 failed"

    def test_what_exceeds_the_limit_is_named(self, results, tmp_path):
        (results / "GPU" / "large.png").write_bytes(os.urandom(5000))
        archive = gpu_packing.pack(results, "GPU", tmp_path / "out", limit=4000)
        assert archive.stat().st_size < 4000
        with zipfile.ZipFile(archive) as file:
            assert "GPU/a.png" in file.namelist()
            assert file.read("left_out.txt") == b"GPU/large.png: 5000 bytes\n"

    def test_a_folder_that_cannot_be_written_does_not_end_the_run(self, results, capsys):
        assert gpu_packing.pack(results, "GPU", results / "GPU.md") is None
        assert "cannot write" in capsys.readouterr().err


class TestReport:
    def test_tables(self, tmp_path):
        nothing = dict.fromkeys(("ms_median", "ms_p20", "ms_p80", "percent_of_roof", "peak_bytes", "saved_bytes"))
        nothing |= dict.fromkeys(("speedup_vs_eager", "timing", "host_us"))
        rows = [
            row(),
            row(provider="literal", **nothing, reason="would not fit"),
            row(provider="peer", timing="events, 3 sets of inputs; not captured: it waits", reason="wrong value 2"),
        ]
        outcomes = {"check": "passed after 9 s", "bench": "stopped at its time limit after 200 s"}
        gpu_report.write(tmp_path / "GPU.md", "NVIDIA_H200", outcomes, rows)
        text = (tmp_path / "GPU.md").read_text()
        assert "# NVIDIA H200\n" in text
        assert "- bench: stopped at its time limit after 200 s" in text
        assert "torch 2.11.0" in text
        assert "| eager | forward | bfloat16 | 1.5 (1.4–1.7) | 42 | 91 | 2 | 0 | 1.00× |" in text
        assert "| literal | forward | bfloat16 | would not fit | | | | | |" in text.replace("|  ", "| ")
        assert "| wrong value 2: 1.5 (1.4–1.7) |" in text
        assert "peer: timed with events, 3 sets of inputs; not captured: it waits." in text

    def test_without_figures(self, tmp_path):
        gpu_report.write(tmp_path / "GPU.md", "GPU", {"check": "failed (exit 1) after 2 s"}, [])
        assert "failed (exit 1)" in (tmp_path / "GPU.md").read_text()

    def test_processes_are_compared_with_one_another(self, tmp_path):
        ours = [
            row(),
            row(provider="gemms", ms_median=0.5, floor=True, times_floor=1.0),
            row(provider="ours", ms_median=1),
        ]
        others = [
            row(provider="peer", ms_median=3.0, speedup_vs_eager=None),
            row(**{"pass": "both"}, speedup_vs_eager=None),
        ]
        parts = tmp_path / "parts"
        parts.mkdir()
        (parts / "1.json").write_text(json.dumps(ours))
        (parts / "2.json").write_text(json.dumps(others))
        (parts / "3.json").write_text('[{"op": "cos')  # cut short
        merged = gpu_report.merge(parts, tmp_path / "GPU.json")
        assert merged == json.loads((tmp_path / "GPU.json").read_text())
        peer = merged[3]
        assert (peer["provider"], peer["speedup_vs_eager"], peer["times_floor"]) == ("peer", 0.5, 6.0)
        assert merged[4]["times_floor"] is None


class TestSession:
    """The plugin of the tests on a GPU."""

    class Item:
        def __init__(self, path, name):
            self.path, self.name, self.originalname = path, name, name.split("[")[0]

    def test_files_take_turns_and_the_reference_is_last(self):
        named = ["a.py::one[triton-gpu]", "a.py::one[reference-gpu]", "a.py::two[cuda-gpu]", "b.py::one", "b.py::two"]
        items = [self.Item(*name.split("::")) for name in named]
        gpu_session.pytest_collection_modifyitems(items)
        order = [f"{item.path}::{item.name}" for item in items]
        assert order == [named[0], named[3], named[2], named[4], named[1]]

    @pytest.mark.parametrize(
        ("broken", "worker", "ends"), [(True, True, True), (False, True, False), (True, False, False)]
    )
    def test_a_worker_whose_gpu_is_broken_ends(self, monkeypatch, broken, worker, ends):
        def synchronize():
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        ended = []
        monkeypatch.setattr(gpu_session, "_lost", [])
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(os, "_exit", ended.append)
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0") if worker else monkeypatch.delenv(
            "PYTEST_XDIST_WORKER", raising=False
        )
        report = type("Report", (), {"failed": True, "nodeid": "tests/test_cosreg.py::test_a"})
        gpu_session.pytest_runtest_logreport(report)
        gpu_session.pytest_runtest_logfinish(report.nodeid)
        assert bool(ended) is ends
