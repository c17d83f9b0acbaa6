"""The public functions: arguments checked, then handed to :mod:`repdeg_fast.ops`. One file an operation."""

from repdeg_fast.functional.admin_norm import admin_norm
from repdeg_fast.functional.contrastive import contrastive_loss, span_pair_loss
from repdeg_fast.functional.cosreg import add_cosine_regularization_, cosine_regularization
from repdeg_fast.functional.gumbel_mix import gradient_reversal, gumbel_mix
from repdeg_fast.functional.linear_cross_entropy import CrossEntropyOutput, linear_cross_entropy, multi_layer_mlm_loss
from repdeg_fast.functional.mlm_losses_and_sample import mlm_losses_and_sample
from repdeg_fast.functional.pairwise import global_orthogonal_regularization, pairwise_cosine, pairwise_max_cosine

__all__ = [
    "CrossEntropyOutput",
    "add_cosine_regularization_",
    "admin_norm",
    "contrastive_loss",
    "cosine_regularization",
    "global_orthogonal_regularization",
    "gradient_reversal",
    "gumbel_mix",
    "linear_cross_entropy",
    "mlm_losses_and_sample",
    "multi_layer_mlm_loss",
    "pairwise_cosine",
    "pairwise_max_cosine",
    "span_pair_loss",
]
