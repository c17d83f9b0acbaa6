"""Ways to train that no loss or module can have alone."""

from repdeg_fast.training.gradient_cache import CachedLosses, Encoded, cached_backward, split_batch

__all__ = ["CachedLosses", "Encoded", "cached_backward", "split_batch"]
