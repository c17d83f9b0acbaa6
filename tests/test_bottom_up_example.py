"""examples/bottom_up_evolution.py: three tasks from one start, their curves, and what it says of them."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "--vocabulary-size 60 --hidden-size 16 --heads 2 --layers 2 --sequence-length 12 --batch-size 8 --steps 5"
WORDS = ["file", "is", "not", "a", "valid", "name", "of", "the", "folder", "and", "cannot", "be", "opened"]


@pytest.fixture(scope="module")
def module():
    folder = str(Path(__file__).parent.parent / "examples")
    sys.path.insert(0, folder)
    import bottom_up_evolution

    yield bottom_up_evolution
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    lines = (f"{WORDS[n % 13]} {WORDS[n * n % 11]} {WORDS[n % 7]} {n}\t{n} {WORDS[n % 7]}" for n in range(2_100))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--pairs", str(path), *SMALL.split(), "--points", "300", "--clusters", "20"]


@pytest.fixture(scope="module")
def finished(module, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, module.main([*arguments, "--output", str(out)])


def test_trains_measures_and_draws(module, finished):
    out, found = finished
    curves = json.loads((out / "curves.json").read_text())
    for task in module.TASKS:
        assert len(curves[task]["mutual information"]) == len(curves[task]["token identity"]) == 3
        assert len(curves[task]["change"]) == len(curves[task]["influence of rare tokens"]) == 2
        assert (out / task.lower() / "history.csv").read_text().count("\n") == 6
    start = [curves[task]["token identity"][0] for task in module.TASKS]
    assert max(start) - min(start) < 0.05  # five steps leave the embeddings about where all began
    assert sorted(curves["distance"]) == ["LM – MLM", "MT – LM", "MT – MLM"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(found) == 10
    assert all(finding.here for finding in found)


def test_goes_on_from_the_checkpoint(module, arguments, finished):
    out, _ = finished
    options = module.parse([*arguments, "--points", "7", "--output", str(out / "mlm")])
    run = module.Run("MLM", module.read_text(options), options)
    assert len(run.history) == 5
    start = module.Model("MLM", run.text, options)
    assert not torch.equal(run.model.encoder.words.weight, start.encoder.words.weight)


def test_all_tasks_start_alike_and_only_lm_looks_to_the_left(module, arguments):
    options = module.parse(arguments)
    text = module.read_text(options)
    models = {}
    for task in module.TASKS:
        torch.manual_seed(0)
        models[task] = module.Model(task, text, options).eval()
    first = models["MT"].encoder.state_dict()
    assert all(torch.equal(first[name], value) for name, value in models["MLM"].encoder.state_dict().items())
    ids = torch.randint(4, 40, (2, 9))
    other = ids.clone()
    other[:, 6:] = 41
    for task, model in models.items():
        a, b = (model.encoder(given, torch.ones_like(given)) for given in (ids, other))
        assert torch.allclose(a[:, :6], b[:, :6], atol=1e-6) == (task == "LM")


def test_masks_are_berts(module):
    ids = torch.randint(4, 50, (300, 40))
    ids[:, 0], ids[:, 30:] = module.BEGIN, module.PAD
    seen, labels = module.masked(ids, 50, torch.Generator().manual_seed(0))
    chosen = labels != module.IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(seen[~chosen], ids[~chosen])
    assert not (chosen & (ids <= module.END)).any()
    assert chosen.float().mean() * 40 / 29 == pytest.approx(0.15, abs=0.01)
    assert (seen[chosen] == 50).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (seen[chosen] == ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.03)


def curves_of(mt, lm, mlm):
    """Of which only mutual information, identity, position and distances say anything."""
    flat = {f"{what} of {part} tokens": [0.2, 0.1] for what in ("change", "influence") for part in ("rare", "frequent")}
    flat |= {f"{what} of middle tokens": [0.2, 0.1] for what in ("change", "influence")}
    out = {
        task: {"mutual information": curve, "with the next token": curve[::-1], "token identity": curve,
               "position distance": curve, "change": [0.2, 0.1]} | flat
        for task, curve in (("MT", mt), ("LM", lm), ("MLM", mlm))
    }  # fmt: skip
    pairs = {"MT – LM": [0.0, 0.5], "MT – MLM": [0.0, 0.3], "LM – MLM": [0.0, 0.6], "MT – MT again": [0.0, 0.4]}
    return {**out, "distance": pairs, "position by chance": 9.0}


@pytest.mark.parametrize(
    ("mlm", "recovers"), [([3.0, 1.0, 2.0], True), ([3.0, 2.0, 1.0], False), ([1.0, 2.0, 3.0], False)]
)
def test_says_what_curves_show_and_what_not(module, mlm, recovers):
    found = {one.of_the_paper: one.shows for one in module.findings(curves_of([3.0, 2.5, 2.2], [3.0, 2.0, 1.0], mlm))}
    assert found["MLM forgets it, then recovers it"] == recovers
    assert found["LM forgets the input token layer by layer"]
    assert found["MT forgets less of it than LM"]
    assert found["MT and MLM are closer to each other than to LM"]
    assert not found["another start matters less than another task"]  # 0.4 and 0.3
    assert not found["frequent tokens change more than rare ones (MT, LM)"]
    assert found["MLM keeps token identity best"] == (mlm[-1] > 2.2)
