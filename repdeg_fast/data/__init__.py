"""Batches for masked-language-model pretraining."""

from repdeg_fast.data.masking import IGNORE_INDEX, MaskingCollator
from repdeg_fast.data.spans import SpanCollator, SpanPairCollator

__all__ = ["IGNORE_INDEX", "MaskingCollator", "SpanCollator", "SpanPairCollator"]
