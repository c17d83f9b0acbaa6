"""Problems for the fuzz tests: what hypothesis draws of each operation, and what its definition makes of it."""

from .admin_norm import admin_norm
from .contrastive import contrastive, span_pairs
from .cosines import cosine_regularization, orthogonal_regularization, pairwise
from .cross_entropy import gradient_filter, linear_cross_entropy
from .draw import Problem, doubles
from .gumbel_mix import gumbel_mix, mlm_losses_and_sample

OPERATIONS = {
    "admin_norm": admin_norm,
    "contrastive_loss": contrastive,
    "cosine_regularization": cosine_regularization,
    "global_orthogonal_regularization": orthogonal_regularization,
    "gradient_filter": gradient_filter,
    "gumbel_mix": gumbel_mix,
    "linear_cross_entropy": linear_cross_entropy,
    "mlm_losses_and_sample": mlm_losses_and_sample,
    "pairwise_cosine": pairwise,
    "span_pair_loss": span_pairs,
}

__all__ = ["OPERATIONS", "Problem", "doubles"]
