"""The pretraining examples: training goes on where it stopped, lowers its losses, and leaves what others load."""

import importlib.util
import json
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "--vocabulary-size 300 --hidden-size 16 --layers 2 --heads 2 --sequence-length 16 --checkpoint-every 4"
SMALL += " --batch-size 8"


@pytest.fixture(scope="module", autouse=True)
def beside_each_other():
    """Examples import what they share as scripts do."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def example(name):
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def arguments(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n# ".join(pydoc_data.topics.topics.values())[:60_000], encoding="utf-8")
    return ["--text", str(text), *SMALL.split()]


def to_the_end(training):
    while len(training.history) < training.options.steps:
        training.step()
    return training


def resumed(run, options, tmp_path):
    """A run that dies two steps after its checkpoint and goes on, beside an unbroken one."""
    module = sys.modules[run.__module__]
    parse = lambda name: module.parse([*options, "--steps", "8", "--output", str(tmp_path / name)])  # noqa: E731
    broken = run(parse("broken"))
    broken.options.output.mkdir()
    for step in range(6):
        broken.step()
        if step == 3:
            broken.save()
    unbroken = to_the_end(run(parse("unbroken")))
    again = run(parse("broken"))
    assert len(again.history) == 4
    to_the_end(again)
    assert again.history == unbroken.history
    for (name, mine), (_, right) in zip(again.model.named_parameters(), unbroken.model.named_parameters(), strict=True):
        assert torch.equal(mine, right), name
    with pytest.raises(SystemExit, match=r"other options .steps 8 → 9"):
        run(module.parse([*options, "--steps", "9", "--output", str(tmp_path / "broken")]))


def test_amos_goes_on_where_it_stopped(arguments, tmp_path):
    options = [*arguments, "--mlm-layers", "1", "2", "--whole-words"]
    resumed(example("pretrain_amos").Amos, options, tmp_path)


def test_torchrun_as_the_readme_has_it(arguments, tmp_path):
    """But for sizes; its numbers on several ranks are those of one process: test_distributed.py."""
    (command,) = re.findall(r"`torchrun (.*?)`", (EXAMPLES.parent / "README.md").read_text(encoding="utf-8"))
    options = ["--mlm-layers", "1", "2", "--steps", "2", "--output", str(tmp_path / "out")]
    run = [sys.executable, "-m", "torch.distributed.run", *command.split(), *arguments, *options]
    done = subprocess.run(run, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, ") == 1  # the first rank tells
    assert {"checkpoint.pt", "amos", "encoder", "history.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_amos_whole(arguments, tmp_path, capsys, monkeypatch):
    module = example("pretrain_amos")
    monkeypatch.setattr(module, "CLASSES", 1)  # a single file's text
    options = ["--mlm-layers", "1", "2", "--steps", "6", "--probe", "--output", str(tmp_path / "out")]
    module.main([*arguments, *options])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"checkpoint.pt", "amos", "encoder", "history.csv", "history.png"}
    assert len((tmp_path / "out" / "history.csv").read_text().splitlines()) == 7
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out" / "encoder")
    assert type(encoder) is transformers.ModernBertModel
    printed = capsys.readouterr().out
    assert "how often each token occurs alone" in printed
    assert "random: 1.000" in printed


def test_amos_lowers_all_losses(arguments, tmp_path):
    module = example("pretrain_amos")
    options = ["--mlm-layers", "1", "2", "--steps", "60", "--learning-rate", "5e-3", "--output", str(tmp_path)]
    training = module.Amos(module.parse([*arguments, *options]))
    for _ in range(60):
        training.step()
    for name in ("mlm_loss_1", "mlm_loss_2", "rtd_loss"):
        losses = [line[name] for line in training.history]
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), name


@pytest.mark.parametrize("options", [[], ["--contrastive"], ["--contrastive", "--chunk-size", "3"]], ids=len)
def test_condenser_goes_on_where_it_stopped(arguments, tmp_path, options):
    resumed(example("pretrain_condenser").Pretraining, [*arguments, *options, "--spans", "2"], tmp_path)


def test_condenser_whole(arguments, tmp_path, capsys, monkeypatch):
    module = example("pretrain_condenser")
    monkeypatch.setattr(module, "CLASSES", 1)
    options = ["--contrastive", "--spans", "2", "--steps", "40", "--learning-rate", "5e-3", "--probe"]
    training = module.main([*arguments, *options, "--output", str(tmp_path / "out")])
    for name in ("head_loss", "late_loss"):
        losses = [line[name] for line in training.history]
        assert sum(losses[-8:]) < 0.95 * sum(losses[:8]), name
    printed = capsys.readouterr().out
    assert "before: recall@1" in printed
    assert printed.count("after: recall@1") == 2  # the plain encoder's also
    assert "Condenser: 1.000" in printed
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out" / "condenser")
    assert type(encoder) is transformers.BertModel
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "condenser")("a").input_ids
    assert (tmp_path / "out" / "history.png").exists()


def test_cosreg_goes_on_and_keeps_the_words_apart(arguments, tmp_path):
    module = example("train_lm_cosreg")
    resumed(module.Run, arguments, tmp_path)
    options = ["--steps", "30", "--learning-rate", "5e-3", "--coefficient", "20", "--output", str(tmp_path / "out")]
    found = module.main([*arguments, *options])
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found
    assert found["cosreg"]["R"] < found["plain"]["R"]
    assert found["cosreg"]["mean cosine"] < found["plain"]["mean cosine"]
    assert (tmp_path / "out" / "words.png").exists()


def test_texts_and_the_probe():
    shared = example("pretraining")
    assert shared.paragraphs("one two three four five six\nseven\n\nshort\n\n  a b c d e f ") == [
        "one two three four five six seven",
        "a b c d e f",
    ]
    assert shared.unigram_entropy(torch.arange(8).repeat(3)) == pytest.approx(torch.tensor(8.0).log().item())
    labels = torch.arange(4).repeat(50)
    vectors = torch.nn.functional.one_hot(labels, 6).float() + 0.3 * torch.randn(200, 6)
    assert shared.probe(vectors, labels) > 0.9
    assert shared.probe(torch.randn(200, 6), labels) < 0.6
    rows, numbers = shared.labelled_rows(torch.arange(10)[:, None], [*"aaaabbbbcd"], 2)
    assert sorted(rows.flatten().tolist()) == [*range(8)]
    assert ((rows.flatten() >= 4).long() == numbers).all()
