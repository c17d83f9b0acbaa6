"""examples/train_admin_translation.py and its data."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

SIZES = ["--encoder-layers", "2", "--decoder-layers", "1", "--d-model", "16"]
SMALL = [*SIZES, "--steps", "3", "--translate", "2", "--device", "cpu"]
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def pairs(tmp_path):
    """2,100 pairs, in every seventh of which a quotation is opened and not closed."""
    path = tmp_path / "pairs.tsv"
    marks = ['"' if n % 7 == 0 else "" for n in range(2_100)]
    lines = [f"{mark}number {n} is here\t{mark}Nummer {n} ist da\tmore" for n, mark in enumerate(marks)]
    path.write_text("\n".join([*lines, "a line without a translation"]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs the script with the given arguments; returns the folder of its output."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_admin_translation.py", *arguments, "--out", str(tmp_path / "out")])
        runpy.run_path(str(EXAMPLES / "train_admin_translation.py"), run_name="__main__")
        return tmp_path / "out"

    return run


def test_a_file_of_pairs_is_taken_as_it_is(pairs, monkeypatch):
    """Quotation marks are text: CSV's rules would join lines up to the next one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from translation_data import load_pairs

    found = dict(load_pairs("de", pairs))
    assert len(found) == 2_100
    assert found['"number 7 is here'] == '"Nummer 7 ist da'
    assert found["number 8 is here"] == "Nummer 8 ist da"


def test_trains_evaluates_and_plots(example, pairs, capsys):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("matplotlib")
    out = example("--pairs", str(pairs), *SMALL)
    printed = capsys.readouterr().out
    assert "1,600 to train on, 500 held out" in printed
    assert printed.count("BLEU") == 2
    with (out / "omega.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 + 3
    for picture in ("curves", "omega", "dependency-post-ln", "dependency-admin"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--steps", "--encoder-layers", "--warmup", "--batch", "--translate"])
def test_numbers_of_things(example, pairs, option, capsys):
    with pytest.raises(SystemExit):
        example("--pairs", str(pairs), *SMALL, option, "0")
    assert f"argument {option}: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
