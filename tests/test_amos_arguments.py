"""What AMOS says of configurations and batches that it cannot take."""

import pytest
import torch

pytest.importorskip("transformers")
from amos_cases import SIZES, B, T, V, amos, batch
from transformers import BertConfig

from repdeg_fast.models import AmosConfig, AmosForPreTraining

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_layers": (4, 2)}, r"mlm_layers: .*increasing .*from 1 to num_hidden_layers = 4, got \(4, 2\)"),
        ({"mlm_layers": (2, 2)}, r"mlm_layers: .*got \(2, 2\)"),
        ({"mlm_layers": ()}, r"mlm_layers: .*got \(\)"),
        ({"mlm_layers": (0, 2)}, r"mlm_layers: .*got \(0, 2\)"),
        ({"mlm_layers": (4, 6, 8)}, r"mlm_layers: .*num_hidden_layers = 4, got \(4, 6, 8\)"),
        ({"hidden_size": 30}, "hidden_size: expected a multiple of num_attention_heads = 4, got 30"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature: expected a finite number above 0"),
        ({"gradient_scale": float("nan")}, "gradient_scale: expected a finite number"),
        ({"gradient_scale": "x"}, "gradient_scale: expected a number, got str"),
        ({"rtd_weight": -1.0}, "rtd_weight: expected a number of at least 0"),
        ({"rtd_weight": float("inf")}, "rtd_weight: expected a finite number"),
        ({"mlm_layers": 3}, "mlm_layers: expected a tuple .*got 3"),
        ({"mlm_layers": "12"}, "mlm_layers: expected a tuple .*got '12'"),
        ({"mlm_layers": ("1", "2")}, r"mlm_layers\[0\]: expected an integer, got str"),
        ({"mlm_layers": (1, 2.0)}, r"mlm_layers\[1\]: expected an integer, got float"),
        ({"rtd_weight": True}, "rtd_weight: expected a number, got bool"),
        ({"mixture": None}, "mixture"),
        ({"detach_mixture": 1}, "detach_mixture: expected True or False, got 1"),
        ({"stop_gradient": None}, "stop_gradient: expected True or False, got None"),
        ({"generator_dropout": "yes"}, "generator_dropout: expected True or False, got 'yes'"),
        ({"mixture": "best"}, "mixture: expected one of 'learned', 'equal', 'random', 'switch', got 'best'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AmosConfig(**SIZES | options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(B, T + 1, dtype=torch.int64)}, r"labels: expected shape \(3, 11\) like input_ids"),
        ({"attention_mask": torch.ones(B, 1, T, T)}, r"attention_mask: expected shape \(3, 11\)"),
        ({"labels": torch.zeros(B, T)}, "labels: expected int64 or int32, got torch.float32"),
        ({"input_ids": torch.zeros(T, dtype=torch.int64)}, r"input_ids: expected .* \(B, T\), got \(11,\)"),
        ({"labels": torch.full((B, T), V)}, f"target: expected values from 0 to {V - 1}"),
        ({"seed": 1.5}, "seed: expected an int"),
        ({"input_ids": None}, "input_ids: expected a tensor .* got NoneType"),
        ({"input_ids": torch.zeros(B, T)}, r"input_ids: expected int64 or int32, got torch.float32"),
        ({"labels": [[1]]}, "labels: expected a tensor or None, got list"),
        ({"attention_mask": "x"}, "attention_mask: expected a tensor or None, got str"),
        ({"token_type_ids": 3}, "token_type_ids: expected a tensor or None, got int"),
        ({"token_type_ids": torch.zeros(B, T)}, "token_type_ids: expected int64 or int32, got torch.float32"),
        ({"position_ids": torch.zeros(B, 2, dtype=torch.int64)}, r"position_ids: expected shape \(3, 11\)"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        amos()(**batch() | changes)


def test_another_models_configuration():
    for config in (None, BertConfig()):
        with pytest.raises(TypeError, match=f"config: expected an AmosConfig, got {type(config).__name__}"):
            AmosForPreTraining(config)
