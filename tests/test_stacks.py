"""What the page of stacks promises beside its examples, which the tests of the documentation run."""

import copy
import re
from pathlib import Path

import pytest
import torch
from huggingface_cases import tiny

STACKS = ["A plain loop", "Hugging Face Trainer", "accelerate", "sentence-transformers", "Lightning"]
PAGE = (Path(__file__).parent.parent / "docs/stacks.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_stack_takes_ten_lines():
    """Below its imports."""
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == STACKS
    for section in sections:
        (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        lines = [line for line in block.splitlines() if line and not re.match(r"(from|import) ", line)]
        assert len(lines) <= 10


@pytest.mark.parametrize(
    "family", ["LlamaForCausalLM", "BertForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM"]
)
def test_a_trainer_accumulates_as_without_us(family, tmp_path):
    """Batches of unequal numbers of labels, two a step; plain descent, which shows how large a gradient was."""
    transformers = pytest.importorskip("transformers")
    from repdeg_fast.integrations import huggingface

    cls = getattr(transformers, family)
    model = tiny(cls, cls.config_class, num_hidden_layers=1)
    rows = [{"input_ids": words, "labels": words} for words in torch.randint(5, 99, (8, 6))]
    for i, row in enumerate(rows):
        row["labels"] = row["labels"].masked_fill(torch.arange(6) > i, -100)
    before, weights = _flat(model), []
    for trained in (copy.deepcopy(model), huggingface.apply(model)):
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=1, optim="sgd",
            learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0,
        )  # fmt: skip
        transformers.Trainer(trained, arguments, train_dataset=rows).train()
        weights.append(_flat(trained) - before)
    plain, fused = weights
    assert plain.norm() > 0.01
    assert (fused - plain).norm() < 1e-4 * plain.norm()


def _flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
