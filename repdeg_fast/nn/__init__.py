"""Modules."""

from repdeg_fast.nn.admin_norm import AdminNorm
from repdeg_fast.nn.cosreg import CosineRegularization

__all__ = ["AdminNorm", "CosineRegularization"]
