"""Modules."""

from repdeg_fast.nn.admin.convert import from_torch
from repdeg_fast.nn.admin.fold import fold_admin
from repdeg_fast.nn.admin.init import initialize_admin_
from repdeg_fast.nn.admin.norm import AdminNorm, admin_norm_like
from repdeg_fast.nn.admin.profile import residual_dependency
from repdeg_fast.nn.admin.transformer import (
    AdminDecoder,
    AdminDecoderLayer,
    AdminEncoder,
    AdminEncoderLayer,
    AdminTransformer,
)
from repdeg_fast.nn.contrastive import ContrastiveLoss
from repdeg_fast.nn.cosreg import CosineRegularization
from repdeg_fast.nn.gumbel_mix import GumbelMixture
from repdeg_fast.nn.mlm_head import MultiLayerMLMHead

__all__ = [
    "AdminDecoder",
    "AdminDecoderLayer",
    "AdminEncoder",
    "AdminEncoderLayer",
    "AdminNorm",
    "AdminTransformer",
    "ContrastiveLoss",
    "CosineRegularization",
    "GumbelMixture",
    "MultiLayerMLMHead",
    "admin_norm_like",
    "fold_admin",
    "from_torch",
    "initialize_admin_",
    "residual_dependency",
]
