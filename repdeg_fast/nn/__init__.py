"""Modules."""

from repdeg_fast.nn.admin_fold import fold_admin
from repdeg_fast.nn.admin_init import initialize_admin_
from repdeg_fast.nn.admin_norm import AdminNorm
from repdeg_fast.nn.admin_profile import residual_dependency
from repdeg_fast.nn.admin_transformer import (
    AdminDecoder,
    AdminDecoderLayer,
    AdminEncoder,
    AdminEncoderLayer,
    AdminTransformer,
    admin_norm_like,
    from_torch,
)
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
    "CosineRegularization",
    "GumbelMixture",
    "MultiLayerMLMHead",
    "admin_norm_like",
    "fold_admin",
    "from_torch",
    "initialize_admin_",
    "residual_dependency",
]
