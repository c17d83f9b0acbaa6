"""Modules."""

from repdeg_fast.nn.admin_norm import AdminNorm
from repdeg_fast.nn.cosreg import CosineRegularization
from repdeg_fast.nn.gumbel_mix import GumbelMixture
from repdeg_fast.nn.mlm_head import MultiLayerMLMHead

__all__ = [
    "AdminNorm",
    "CosineRegularization",
    "GumbelMixture",
    "MultiLayerMLMHead",
]
