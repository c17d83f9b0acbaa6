"""Other packages that do what we do, each described once: what it is called, what pip installs, what Python imports,
and where it runs. One that is not there is listed with the reason, not left out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.bench.suite import Inputs, Provider, leaves


@dataclass(frozen=True)
class Peer:
    """A package beside ours in the tables."""

    name: str  # in the tables
    package: str  # for pip
    module: str  # for Python
    only_on_gpu: bool = False
    missing: Callable[[], str | None] = lambda: None  # what else it lacks here

    def unavailable(self, inputs: Inputs) -> str | None:
        """Why it cannot run here, with the remedy, or ``None``."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed; pip install {self.package}"
        if self.only_on_gpu and not leaves(inputs)[0].is_cuda:
            return "its kernels need a GPU"
        return self.missing()

    def provider(self, prepare: Callable[[Inputs], Callable[[], Tensor]], **options: Any) -> Provider:
        """It as one of a suite's providers; ``options`` are those of :class:`Provider`."""
        peer = "" if self.module == "torch" else self.package
        options = {"name": self.name, **options}
        return Provider(prepare=prepare, unavailable=self.unavailable, peer=peer, **options)

    @property
    def version(self) -> str | None:
        """Of the package that is installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _torch_is_older() -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"needs torch 2.13, this is {torch.__version__}"


ADMIN_TORCH = Peer("admin-torch", "admin-torch", "admin_torch")
CUT_CROSS_ENTROPY = Peer("cut-cross-entropy", "cut-cross-entropy", "cut_cross_entropy")
INFO_NCE = Peer("info-nce-pytorch", "info-nce-pytorch", "info_nce")
LIGER = Peer("liger", "liger-kernel", "liger_kernel", only_on_gpu=True)
METRIC_LEARNING = Peer("metric-learning", "pytorch-metric-learning", "pytorch_metric_learning")
QUACK = Peer("quack", "quack-kernels", "quack", only_on_gpu=True)
SENTENCE_TRANSFORMERS = Peer("sentence-transformers", "sentence-transformers", "sentence_transformers")
TORCH_CHUNKED = Peer("torch-chunked", "torch", "torch", missing=_torch_is_older)
PACKAGES = (
    ADMIN_TORCH,
    CUT_CROSS_ENTROPY,
    INFO_NCE,
    LIGER,
    METRIC_LEARNING,
    QUACK,
    SENTENCE_TRANSFORMERS,
)  # beside torch
