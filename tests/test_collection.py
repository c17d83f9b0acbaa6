"""What is collected where: tests that cannot run here are not, and one line says so."""

import re
from pathlib import Path

import pytest
import torch

from repdeg_fast.bench import peers

FILES = [str(Path(__file__).parent / name) for name in ("test_cosreg.py", "test_large.py")]


class Collected:
    def __init__(self):
        self.names = []

    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]


@pytest.fixture
def collect(monkeypatch, capsys):
    """The tests of two files, as collected on a machine with or without a GPU, and what was printed."""

    def run(gpu, interpreter=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreter)))
        collected = Collected()
        marker = ["-m", "interpreter"] if interpreter else []
        pytest.main([*FILES, *marker, "--collect-only", "-q", "-p", "no:cacheprovider"], plugins=[collected])
        return collected.names, capsys.readouterr().out

    return run


def test_what_cannot_run_here_is_counted_in_one_line(collect):
    names, printed = collect(gpu=False)
    assert any("[reference" in name for name in names)
    assert not [name for name in names if "gpu" in name or "interpreter" in name]
    (line,) = (line for line in printed.splitlines() if "not run here" in line)
    assert "tests need an NVIDIA GPU (`make gpu`)" in line
    assert "tests need TRITON_INTERPRET=1 (the second run of `make test`)" in line


def test_the_second_run_counts_nothing_that_it_was_not_asked_for(collect):
    names, printed = collect(gpu=False, interpreter=True)
    assert names
    assert all("interpreter" in name for name in names)
    assert "not run here" not in printed


def test_on_a_gpu_its_tests_run_there_alone(collect):
    names, _ = collect(gpu=True)
    places = {name for name in names if name.startswith("test_more_than_two_to_the_31_elements[")}
    assert places == {
        f"test_more_than_two_to_the_31_elements[{place}-gpu]" for place in ("reference", "triton", "cuda")
    }
    assert any("[cuda-gpu" in name for name in names)


def test_no_file_needs_a_package_that_is_only_measured_or_compared():
    """On a machine with a GPU few of them are there. One that is missing would cost all tests of its file."""
    needed = []
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for package in (peer.module for peer in peers.PACKAGES):
            found = re.search(rf"^(import|from) {package}\b", text, re.MULTILINE)
            if found and f'importorskip("{package}' not in text[: found.start()]:
                needed.append((path.name, package))
    assert needed == []
