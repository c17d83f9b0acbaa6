"""Faults that the tests must see, one at a time, a list a layer: `tests/faults.py` puts them in."""

from . import analysis, cpu, cpu_shared, cuda, distributed, python, triton
from .fault import Fault

FAULTS = [fault for layer in (cpu, cpu_shared, cuda, triton, python, distributed, analysis) for fault in layer.FAULTS]

__all__ = ["FAULTS", "Fault"]
