"""Representations among the evaluations of sentence-transformers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from repdeg_fast.analysis import alignment
from repdeg_fast.analysis.metrics import representation_metrics


class RepresentationEvaluator(SentenceEvaluator):
    """How evenly sentence vectors are spread: average cosine, effective rank, IsoScore, uniformity; of pairs alignment.

    Its dict goes where those of other evaluators go: the Trainer's logs (W&B, TensorBoard) and the model card.

    Args:
        sentences: Texts to encode.
        positives: For each a text that means the same, for alignment; or None.
        name: Before each metric's name.
        batch_size: Of encoding.
        write_csv: Appends to ``representation_evaluation_<name>_results.csv`` in the trainer's output folder.

    Raises:
        ValueError: fewer than two sentences, or not as many positives.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        positives: Sequence[str] | None = None,
        *,
        name: str = "",
        batch_size: int = 32,
        write_csv: bool = True,
    ):
        super().__init__()
        if len(sentences) < 2:
            raise ValueError(f"sentences: expected at least 2, got {len(sentences)}")
        if positives is not None and len(positives) != len(sentences):
            raise ValueError(f"positives: expected {len(sentences)}, one a sentence, got {len(positives)}")
        self.sentences, self.positives = list(sentences), None if positives is None else list(positives)
        self.name, self.batch_size, self.write_csv = name, batch_size, write_csv
        self.primary_metric = "uniformity"
        self.greater_is_better = False

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        def encode(texts: list[str]) -> Any:
            return model.encode(texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False)

        vectors = encode(self.sentences)
        metrics = representation_metrics(vectors)
        if self.positives is not None:
            metrics["alignment"] = alignment(vectors, encode(self.positives))
        if output_path is not None and self.write_csv:
            self._append(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _append(self, folder: Path, row: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"representation_evaluation{'_' * bool(self.name)}{self.name}_results.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def get_config_dict(self) -> dict[str, Any]:
        return {"sentences": len(self.sentences), "positives": self.positives is not None}
