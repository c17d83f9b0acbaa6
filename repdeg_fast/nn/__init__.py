"""Modules."""

from repdeg_fast.nn.cosreg import CosineRegularization

__all__ = ["CosineRegularization"]
