"""Models that train with the fused operations, a file each. Those on Hugging Face blocks need transformers 5
(``pip install 'repdeg-fast[hf]'``), which is imported when one of them is asked for."""

import importlib
from typing import Any

_HOMES = {
    "AmosConfig": "amos",
    "AmosForPreTraining": "amos",
    "CoCondenserForPreTraining": "condenser",
    "CondenserForPreTraining": "condenser",
}
__all__ = [
    "AmosConfig",
    "AmosForPreTraining",
    "CoCondenserForPreTraining",
    "CondenserForPreTraining",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
