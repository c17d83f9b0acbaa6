"""Fused kernels for representation-aware language-model pretraining: CosReg, AMOS, Condenser, ADMIN."""

from repdeg_fast import backends, data, models
from repdeg_fast import nn as nn
from repdeg_fast.backends import use_backend
from repdeg_fast.functional import (
    CrossEntropyOutput,
    add_cosine_regularization_,
    admin_norm,
    contrastive_loss,
    cosine_regularization,
    global_orthogonal_regularization,
    gradient_reversal,
    gumbel_mix,
    linear_cross_entropy,
    mlm_losses_and_sample,
    multi_layer_mlm_loss,
    pairwise_cosine,
    pairwise_max_cosine,
    span_pair_loss,
)
from repdeg_fast.nn import (
    AdminNorm,
    AdminTransformer,
    ContrastiveLoss,
    CosineRegularization,
    GumbelMixture,
    MultiLayerMLMHead,
    fold_admin,
    from_torch,
    initialize_admin_,
    residual_dependency,
)

__version__ = "0.1.0"
__all__ = [  # not `nn`: a star import must not take torch's away
    "AdminNorm",
    "AdminTransformer",
    "ContrastiveLoss",
    "CosineRegularization",
    "CrossEntropyOutput",
    "GumbelMixture",
    "MultiLayerMLMHead",
    "add_cosine_regularization_",
    "admin_norm",
    "backends",
    "contrastive_loss",
    "cosine_regularization",
    "data",
    "fold_admin",
    "from_torch",
    "global_orthogonal_regularization",
    "gradient_reversal",
    "gumbel_mix",
    "initialize_admin_",
    "linear_cross_entropy",
    "mlm_losses_and_sample",
    "models",
    "multi_layer_mlm_loss",
    "pairwise_cosine",
    "pairwise_max_cosine",
    "residual_dependency",
    "span_pair_loss",
    "use_backend",
]
