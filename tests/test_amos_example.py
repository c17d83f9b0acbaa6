"""examples/pretrain_amos.py: training goes on where it stopped, and lowers its losses."""

import importlib.util
import pydoc_data.topics
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain_amos.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("pretrain_amos", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["pretrain_amos"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values())[:40_000], encoding="utf-8")
    options = "--tokenizer text --vocabulary-size 400 --hidden-size 16 --layers 2 --mlm-layers 1 2 --sequence-length 16"
    return ["--text", str(text), "--whole-words", "--checkpoint-every", "4", *options.split()]


def test_resumed_training_is_exact(example, arguments, tmp_path):
    unbroken = example.main([*arguments, "--steps", "8", "--output", str(tmp_path / "unbroken")])
    broken = example.Training(example.parse([*arguments, "--steps", "8", "--output", str(tmp_path / "broken")]))
    (tmp_path / "broken").mkdir()
    for step in range(6):  # dies two steps after its checkpoint
        broken.step()
        if step == 3:
            broken.save()
    resumed = example.main([*arguments, "--steps", "8", "--output", str(tmp_path / "broken")])
    assert resumed.history == unbroken.history
    for (name, mine), (_, right) in zip(
        resumed.model.named_parameters(), unbroken.model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, right), name
    written = {path.name for path in (tmp_path / "broken").iterdir()}
    assert written >= {"checkpoint.pt", "amos", "encoder", "history.csv"}
    assert len((tmp_path / "broken" / "history.csv").read_text().splitlines()) == 9
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "broken" / "encoder")) is transformers.BertModel
    with pytest.raises(SystemExit, match=r"other options .steps 8 → 9"):
        example.main([*arguments, "--steps", "9", "--output", str(tmp_path / "broken")])


def test_training_lowers_all_losses(example, arguments, tmp_path):
    options = ["--steps", "60", "--learning-rate", "5e-3", "--output", str(tmp_path)]
    training = example.Training(example.parse([*arguments, *options]))
    for _ in range(60):
        training.step()
    for name in ("mlm_loss_1", "mlm_loss_2", "rtd_loss"):
        losses = [line[name] for line in training.history]
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), name
