"""ADMIN's residual block as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repdeg_fast._checks import check_dtype, check_finite, check_flag, check_size
from repdeg_fast.functional.admin_norm import admin_norm, check_options


class AdminNorm(nn.Module):
    """Residual sum and normalization of a post-LN block in one kernel (ADMIN, arXiv 2004.08249, arXiv 2008.07772):

    y = LayerNorm(x ⊙ ω + dropout(branch + branch_bias)) ⊙ weight + bias; see :func:`repdeg_fast.admin_norm`.

    Example::

        self.norm = AdminNorm(768, dropout=0.1)  # replaces nn.Dropout and nn.LayerNorm
        hidden = self.norm(hidden, self.attention(hidden))

    Args:
        normalized_shape: d, the length of the last dimension.
        omega: what every entry of the trainable ω (d,) starts from; see ``initialize_admin_`` for the paper's rules.
        trainable_omega: ``False``: ω is a constant, a buffer of one value, as in admin-torch unless it is asked for a
            parameter. It is in the ``state_dict``, and costs neither a gradient nor state of an optimizer.
        dropout: probability in [0, 1), applied to the branch while training.
        eps: added to the variance.
        norm: ``"layer"`` or ``"rms"``.
        elementwise_affine, bias: whether there is a ``weight``, and with it (LayerNorm only) a ``bias``, as in
            ``nn.LayerNorm`` and ``nn.RMSNorm``.
        branch_bias: whether to add a trainable bias to the branch, in place of that of its last linear layer.
        save: see :func:`repdeg_fast.admin_norm`.
    """

    omega: Tensor  # a parameter (d,), or a buffer (1,)
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    branch_bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int,
        omega: float = 1.0,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        norm: str = "layer",
        elementwise_affine: bool = True,
        bias: bool = True,
        branch_bias: bool = False,
        save: str = "auto",
        trainable_omega: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("normalized_shape", normalized_shape)
        check_finite("omega", omega)
        check_options(dropout, eps, norm, save)
        flags = {"elementwise_affine": elementwise_affine, "bias": bias, "branch_bias": branch_bias}
        for name, flag in (flags | {"trainable_omega": trainable_omega}).items():
            check_flag(name, flag)
        check_dtype("dtype", dtype)
        self.normalized_shape, self.initial_omega = normalized_shape, float(omega)
        self.dropout, self.eps, self.norm, self.save = dropout, eps, norm, save

        def parameter(name: str, there: bool) -> None:
            empty = torch.empty(normalized_shape, device=device, dtype=dtype) if there else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))

        if trainable_omega:
            parameter("omega", True)
        else:
            self.register_buffer("omega", torch.empty(1, device=device, dtype=dtype))
        parameter("weight", elementwise_affine)
        parameter("bias", elementwise_affine and bias and norm == "layer")
        parameter("branch_bias", branch_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """ω to its start value, weight to 1, biases to 0."""
        nn.init.constant_(self.omega, self.initial_omega)
        for parameter, start in ((self.weight, 1.0), (self.bias, 0.0), (self.branch_bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, start)

    def fix_omega(self, value: float) -> None:
        """Make ω the constant ``value``: a buffer of one value in the place of the parameter. Optimizers that have the
        parameter should be made anew."""
        check_finite("value", value)
        constant = torch.full_like(self.omega[:1], value, requires_grad=False)
        del self.omega
        self.register_buffer("omega", constant)

    def forward(self, x: Tensor, branch: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """(..., d). ``x``: the residual stream; ``branch``: the sub-layer's output, of the same shape and dtype."""
        if isinstance(x, Tensor) and x.shape[-1:] != (self.normalized_shape,):
            raise ValueError(f"x: expected a last dimension of {self.normalized_shape}, got shape {tuple(x.shape)}")
        return admin_norm(
            x,
            branch,
            self.omega,
            self.weight,
            self.bias,
            branch_bias=self.branch_bias,
            dropout=self.dropout,
            eps=self.eps,
            norm=self.norm,
            training=self.training,
            seed=seed,
            save=self.save,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, omega={self.initial_omega}, dropout={self.dropout}, eps={self.eps}, "
            f"norm={self.norm!r}, elementwise_affine={self.weight is not None}, bias={self.bias is not None}, "
            f"branch_bias={self.branch_bias is not None}, save={self.save!r}, "
            f"trainable_omega={isinstance(self.omega, nn.Parameter)}"
        )


def admin_norm_like(layer_norm: nn.LayerNorm, dropout: float = 0.0) -> AdminNorm:
    """An AdminNorm that takes the place of ``layer_norm(x + dropout(branch))``, with ω = 1 and the same parameters.

    ``weight`` and ``bias`` are shared with ``layer_norm``, not copied: an optimizer that holds them stays valid.
    """
    if not isinstance(layer_norm, nn.LayerNorm):
        raise TypeError(f"layer_norm: expected an nn.LayerNorm, got {type(layer_norm).__name__}")
    if len(layer_norm.normalized_shape) != 1:
        raise ValueError(
            f"layer_norm: expected one over the last dimension, got normalized_shape {layer_norm.normalized_shape}"
        )
    weight, bias = layer_norm.weight, layer_norm.bias
    norm = AdminNorm(
        layer_norm.normalized_shape[0],
        dropout=dropout,
        eps=layer_norm.eps,
        elementwise_affine=weight is not None,
        bias=bias is not None,
        device=None if weight is None else weight.device,
        dtype=None if weight is None else weight.dtype,
    )
    norm.weight, norm.bias = weight, bias
    return norm.train(layer_norm.training)
