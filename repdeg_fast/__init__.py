"""Fused kernels for representation-aware language-model pretraining: CosReg, AMOS, Condenser, ADMIN."""

from repdeg_fast import backends, nn
from repdeg_fast.backends import use_backend
from repdeg_fast.functional import add_cosine_regularization_, admin_norm, cosine_regularization
from repdeg_fast.nn import AdminNorm, CosineRegularization

__version__ = "0.1.0"
__all__ = [
    "AdminNorm",
    "CosineRegularization",
    "add_cosine_regularization_",
    "admin_norm",
    "backends",
    "cosine_regularization",
    "nn",
    "use_backend",
]
