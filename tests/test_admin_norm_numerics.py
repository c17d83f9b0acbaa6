"""ADMIN's residual block where rounding shows: rows far from zero, NaN and Inf."""

import pytest
import torch
from admin_norm_cases import PARAMETERS, actual, expected, inputs
from helpers import relative_error

from repdeg_fast import admin_norm
from repdeg_fast.ops.admin_norm import operation  # noqa: F401


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_not_masked(place, bad):
    for name in ("x", "branch"):
        tensors = inputs(6, 64, device=place.device)
        tensors[name].data[2, 5] = bad
        y, gradients = actual(tensors, torch.randn(6, 64, device=place.device))
        assert y[2].isnan().any()
        assert gradients["x"][2].isnan().any()
        assert y[[0, 1, 3, 4, 5]].isfinite().all()
        assert gradients["x"][[0, 1, 3, 4, 5]].isfinite().all()


def test_a_row_far_from_zero_keeps_its_variance(place):
    """Σz² − (Σz)²/d would lose all digits here. Also in rows that are merged from chunks."""
    for d in (768, 8712):
        tensors = inputs(3, d, device=place.device, absent=PARAMETERS)
        with torch.no_grad():
            tensors["x"] += 1000
        true_y, _ = expected(tensors, torch.zeros(3, d))
        assert relative_error(admin_norm(**tensors), true_y) <= 1e-4  # fp32 holds z itself to 6e-5
