"""The Triton kernels of Gumbel mixing in the form of its contract. Imported where Triton is to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repdeg_fast.contracts.gumbel_mix import Kernels
from repdeg_fast.ops.chunked_vocabulary import ChunkedVocabulary

if TYPE_CHECKING:
    from triton_kernels import gumbel_mix
else:
    from repdeg_fast.triton_kernels import gumbel_mix

kernels: Kernels = ChunkedVocabulary(gumbel_mix)
