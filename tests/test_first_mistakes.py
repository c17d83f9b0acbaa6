"""What a new user gets wrong first, and the remedy that the error names."""

import pytest
import torch
from typer.testing import CliRunner

from repdeg_fast import AdminNorm, contrastive_loss, cosine_regularization, linear_cross_entropy
from repdeg_fast._checks import InputError
from repdeg_fast.analysis import representation_metrics, texts, weights
from repdeg_fast.cli.app import app
from repdeg_fast.training import cached_backward


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: cosine_regularization(layer),
        lambda layer: linear_cross_entropy(torch.ones(2, 3), layer, torch.ones(2).long()),
    ],
)
def test_a_layer_in_place_of_its_weight(call):
    with pytest.raises(TypeError, match=r"weight: expected a tensor, got Linear; pass its \.weight"):
        call(torch.nn.Linear(3, 5))


def test_points_that_are_a_layer():
    with pytest.raises(TypeError, match=r"points: expected a tensor, got Embedding; pass its \.weight"):
        representation_metrics(torch.nn.Embedding(5, 3))


def test_another_width_than_the_block_has():
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 16, got shape \(2, 8\)"):
        AdminNorm(16)(torch.ones(2, 8), torch.ones(2, 8))


def test_embeddings_that_train_nothing():
    layer = torch.nn.Linear(3, 2)
    for encode in (lambda x: layer(x).detach(), torch.no_grad()(layer.forward)):
        with pytest.raises(ValueError, match="encode: expected embeddings with a gradient, got none in any chunk"):
            cached_backward(encode, contrastive_loss, torch.ones(4, 3), torch.ones(4, 3), chunk_size=2)


def test_models_that_are_wrapped_named_or_derived():
    transformers = pytest.importorskip("transformers")
    from repdeg_fast.integrations import huggingface

    class Mine(transformers.BertForMaskedLM):
        pass

    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    config = transformers.BertConfig(**sizes)
    for given, remedy in (
        ("bert-base-uncased", r"got str; load it first"),
        (
            torch.nn.DataParallel(transformers.BertForMaskedLM(config)),
            "apply it to the model inside, before it is wrapped",
        ),
        (Mine(config), "got Mine, a subclass, whose forward may do something else"),
    ):
        with pytest.raises(TypeError, match=remedy):
            huggingface.apply(given)


def test_a_callback_without_its_trainer():
    pytest.importorskip("transformers")
    from repdeg_fast.integrations.representations import RepresentationCallback

    with pytest.raises(TypeError, match="trainer: expected the Trainer that it is added to, got Linear"):
        RepresentationCallback(torch.nn.Linear(2, 2))


def test_a_folder_in_place_of_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is a folder; expected a safetensors or torch checkpoint"):
        weights.load(tmp_path, None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"is a folder; expected a file in it, as .*model\.safetensors"):
        weights.load(tmp_path, None)


def test_a_models_name_in_place_of_its_folder(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="expected the folder of a Hugging Face model, as save_pretrained or"):
        texts.load_model(tmp_path / "bert-base-uncased")


def test_options_that_take_no_value_do_not_ask_for_one():
    shown = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    flags = [line for line in shown.splitlines() if any(f"{name} " in line for name in ("--full", "--wide", "--list"))]
    assert len(flags) == 3
    assert not [line for line in flags if "<bool>" in line]
