"""Batches for pretraining."""

from repdeg_fast.data.masking import IGNORE_INDEX, MaskingCollator

__all__ = ["IGNORE_INDEX", "MaskingCollator"]
