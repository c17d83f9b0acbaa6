"""What the operators share."""

from __future__ import annotations

from typing import Any, NoReturn


def forbid_double_backward(backward_op: Any, name: str) -> None:
    """Make a second differentiation through ``backward_op`` an error that says what to do."""

    def raise_error(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name} has no second derivative in its fused form; write the term with the formula in "
            f"repdeg_fast.reference where create_graph=True is needed"
        )

    backward_op.register_autograd(raise_error)
