"""Losses and evaluations for sentence-transformers. Needs version 6 or later (``pip install 'repdeg-fast[st]'``).

Example::

    from repdeg_fast.integrations import sentence_transformers as fused

    loss = fused.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)  # or: fused.apply(an existing loss)
    SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss).train()
"""

try:
    from repdeg_fast.integrations.sentence_transformers.evaluator import RepresentationEvaluator
    from repdeg_fast.integrations.sentence_transformers.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
        apply,
    )
    from repdeg_fast.integrations.sentence_transformers.orthogonality import GlobalOrthogonalRegularizationLoss
except ImportError as missing:
    raise ImportError(
        f"repdeg_fast.integrations.sentence_transformers needs sentence-transformers 6 ({missing}): "
        "pip install 'repdeg-fast[st]'"
    ) from missing

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "GlobalOrthogonalRegularizationLoss",
    "MultipleNegativesRankingLoss",
    "RepresentationEvaluator",
    "apply",
]
