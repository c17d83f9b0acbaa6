"""What ranks do in tests/test_distributed.py: the same problem cut over them, beside the one of one process."""

from .cosreg import cosreg, cosreg_of_two_dimensions
from .cross_entropy import cross_entropy, cross_entropy_options
from .dtensors import dtensors, nothing_to_do, style
from .failures import bad_contrastive, bad_input, bad_ranges, die, disagree, late
from .sample import joint, sample, seeds
from .shares import contrastive, moments

__all__ = [
    "bad_contrastive",
    "bad_input",
    "bad_ranges",
    "contrastive",
    "cosreg",
    "cosreg_of_two_dimensions",
    "cross_entropy",
    "cross_entropy_options",
    "die",
    "disagree",
    "dtensors",
    "joint",
    "late",
    "moments",
    "nothing_to_do",
    "sample",
    "seeds",
    "style",
]
