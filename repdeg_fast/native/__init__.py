"""The C++ and CUDA kernels of ``csrc/``: :mod:`~repdeg_fast.native.build` compiles, caches and loads them; the other
files, one an operation, give them the form of the operation's contract."""

from typing import Any

Namespace = Any  # of torch.ops, whose operators have no types
