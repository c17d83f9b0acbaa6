"""Gumbel mixing names the argument that is wrong."""

import pytest
import torch

from repdeg_fast import gumbel_mix


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.randn(4, 8)}, ValueError, r"hidden_states: expected shape \(K, M, d\)"),
        ({"hidden_states": torch.ones(2, 4, 8, dtype=torch.int64)}, TypeError, "hidden_states: expected float32"),
        ({"hidden_states": torch.randn(2, 4, 8, dtype=torch.float64)}, TypeError, "all or none in float64"),
        ({"mixture_logits": torch.randn(4, 3)}, ValueError, r"mixture_logits: expected shape \(4, 2\).*got \(4, 3\)"),
        ({"mixture_logits": torch.randn(5, 2)}, ValueError, r"mixture_logits: expected shape \(4, 2\).*got \(5, 2\)"),
        ({"mixture_logits": None}, ValueError, "mixture_logits: .*None"),
        ({"weight": torch.randn(20, 9)}, ValueError, r"weight: expected shape \(V, 8\)"),
        ({"weight": torch.randn(0, 8)}, ValueError, r"weight: expected shape \(V, 8\)"),
        ({"bias": torch.randn(19)}, ValueError, r"bias: expected shape \(20,\)"),
        ({"bias": torch.randn(20, device="meta")}, ValueError, "bias: expected device cpu"),
        ({"embedding": torch.randn(19, 8)}, ValueError, r"embedding: expected shape \(20, d_f\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"gradient_scale": float("nan")}, ValueError, "gradient_scale"),
        ({"temperature": "0.3"}, TypeError, "temperature: expected a number, got str"),
        ({"hard": "x"}, TypeError, "hard: expected True or False, got 'x'"),
        ({"hard": None}, TypeError, "hard: expected True or False, got None"),
        ({"hidden_states": [torch.randn(4, 8)]}, TypeError, "hidden_states: expected a tensor, got list"),
        ({"bias": 0.0}, TypeError, "bias: expected a tensor, got float"),
        ({"seed": "1"}, TypeError, "seed"),
        ({"padding_idx": 20}, ValueError, "padding_idx: expected a row of weight, from 0 to 19, got 20"),
        ({"padding_idx": "0"}, TypeError, "padding_idx: expected an integer, got str"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed: expected device cpu"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "hidden_states": torch.randn(2, 4, 8),
        "mixture_logits": torch.randn(4, 2),
        "weight": torch.randn(20, 8),
    }
    with pytest.raises(error, match=message):
        gumbel_mix(**(arguments | change))
