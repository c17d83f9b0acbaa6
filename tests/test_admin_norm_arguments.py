"""ADMIN's residual block as a module, and what both forms say of wrong arguments."""

import pytest
import torch
from admin_norm_cases import PARAMETERS

from repdeg_fast import AdminNorm, admin_norm
from repdeg_fast.ops.admin_norm import operation  # noqa: F401


class TestModule:
    def test_is_the_function(self, place):
        module = AdminNorm(64, omega=1.5, dropout=0.2, eps=1e-3, branch_bias=True, device=place.device)
        x, branch = torch.randn(2, 3, 64, device=place.device), torch.randn(2, 3, 64, device=place.device)
        parameters = dict(module.named_parameters())
        assert set(parameters) == set(PARAMETERS)
        assert (module.omega == 1.5).all()
        y = admin_norm(x, branch, **parameters, dropout=0.2, eps=1e-3, seed=4)
        assert torch.equal(module(x, branch, seed=4), y)
        module.eval()
        assert torch.equal(module(x, branch), admin_norm(x, branch, **parameters, eps=1e-3))

    def test_is_layer_norm_at_the_start(self):
        x, branch = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
        torch.testing.assert_close(AdminNorm(64)(x, branch), torch.nn.LayerNorm(64)(x + branch))
        torch.testing.assert_close(AdminNorm(64, norm="rms")(x, branch), torch.nn.RMSNorm(64, eps=1e-5)(x + branch))

    def test_options(self):
        names = lambda **options: {name for name, _ in AdminNorm(8, **options).named_parameters()}  # noqa: E731
        assert names() == {"omega", "weight", "bias"}
        assert names(bias=False) == names(norm="rms") == {"omega", "weight"}
        assert names(elementwise_affine=False) == {"omega"}
        assert "dropout=0.1" in repr(AdminNorm(8, dropout=0.1))
        assert AdminNorm(8, dtype=torch.bfloat16).omega.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"normalized_shape": 0}, "normalized_shape: .*got 0"),
            ({"normalized_shape": (8,)}, r"normalized_shape: .*got \(8,\)"),
            ({"dropout": 1.0}, "dropout: .*got 1.0"),
            ({"norm": "batch"}, "norm: expected one of 'layer', 'rms', got 'batch'"),
            ({"save": "none"}, "save: expected one of 'auto', 'output', 'input', got 'none'"),
            ({"eps": -1.0}, "eps: .*got -1.0"),
            ({"omega": float("nan")}, "omega: .*got nan"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            AdminNorm(**{"normalized_shape": 8, **options})
        with pytest.raises(TypeError, match="omega: expected a number, got Tensor"):
            AdminNorm(8, torch.ones(8))


def ones(*shape, **options):
    return torch.ones(shape, **options)


def nested():
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": ones(4, 3, dtype=torch.int64)}, TypeError, "x: .*torch.int64"),
        ({"x": ones()}, ValueError, r"x: expected shape \(..., d\)"),
        ({"x": ones(4, 0)}, ValueError, r"x: expected shape \(..., d\)"),
        ({"branch": ones(3, 4)}, ValueError, r"branch: expected shape \(4, 3\) like x, got \(3, 4\)"),
        ({"branch": ones(4, 3).bfloat16()}, TypeError, r"branch: expected torch.float32 like x, got torch.bfloat16"),
        ({"branch": ones(4, 3, device="meta")}, ValueError, "branch: expected device cpu like x, got meta"),
        ({"omega": ones(4)}, ValueError, r"omega: expected shape \(3,\).*got \(4,\)"),
        ({"omega": "1"}, TypeError, "omega: .*got '1'"),
        ({"omega": float("nan")}, TypeError, "omega: .*got nan"),
        ({"omega": ones(3).double()}, TypeError, "omega: expected torch.float32 for x of torch.float32"),
        ({"weight": ones(3, 1)}, ValueError, r"weight: expected shape \(3,\)"),
        ({"weight": ones(3).bfloat16()}, TypeError, "weight: expected torch.float32"),
        ({"bias": ones(2)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"bias": ones(3, device="meta")}, ValueError, "bias: expected device cpu"),
        ({"branch_bias": ones(1)}, ValueError, r"branch_bias: expected shape \(3,\)"),
        ({"dropout": 1.0}, ValueError, r"dropout: .*\[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: .*got -0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout: .*got nan"),
        ({"dropout": None}, TypeError, "dropout: expected a number, got NoneType"),
        ({"x": nested()}, ValueError, r"x: expected a dense tensor, got a nested one; call .to_padded_tensor"),
        ({"eps": 0.0}, ValueError, "eps: .*got 0"),
        ({"norm": "Layer"}, ValueError, "norm: expected one of 'layer', 'rms', got 'Layer'"),
        ({"save": "both"}, ValueError, "save: expected one of 'auto', 'output', 'input', got 'both'"),
        ({"dropout": 0.1, "seed": 1.5}, TypeError, "seed: expected an int"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, ValueError, "seed: expected one element"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        admin_norm(**{"x": ones(4, 3), "branch": ones(4, 3), **arguments})
