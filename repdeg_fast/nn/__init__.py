"""Modules."""

from repdeg_fast.nn.cosreg import CosineRegularization
from repdeg_fast.nn.gumbel_mix import GumbelMixture

__all__ = ["CosineRegularization", "GumbelMixture"]
