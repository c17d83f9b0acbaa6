"""DistilBERT, ELECTRA's generator and ModernBERT with the fused head: their unpatched selves."""

import copy
import inspect

import pytest
import torch
from helpers import relative_error
from huggingface_cases import batch, loss_and_gradients, tiny

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    DataCollatorWithFlattening,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from repdeg_fast.integrations import huggingface  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = {
    "distilbert": (DistilBertForMaskedLM, DistilBertConfig, {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "electra": (ElectraForMaskedLM, ElectraConfig, {"embedding_size": 24}),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig, {"pad_token_id": 1, "global_attn_every_n_layers": 2}),
}
MODERN = FAMILIES["modernbert"]


def make(family, **changes):
    cls, config, sizes = FAMILIES[family]
    return tiny(cls, config, **sizes | changes)


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


def assert_alike(plain, fused, inputs):
    """Loss and every gradient, in float64."""
    expected, right = loss_and_gradients(plain.double(), inputs)
    loss, gradients = loss_and_gradients(fused.double(), inputs)
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0)  # ModernBERT's own loss is in float32
    for name in right:
        torch.testing.assert_close(gradients[name], right[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, tied):
    model = make(family, tie_word_embeddings=tied)
    assert_alike(copy.deepcopy(model), huggingface.apply(model), batch())


def test_padding_and_embeddings_as_input(model):
    inputs = batch() | {"attention_mask": (torch.arange(11) < torch.tensor([[11], [7], [9]])).long()}
    assert_alike(copy.deepcopy(model), huggingface.apply(copy.deepcopy(model)), inputs)
    inputs["inputs_embeds"] = torch.randn(3, 11, model.get_input_embeddings().embedding_dim).double()
    del inputs["input_ids"]
    assert_alike(copy.deepcopy(model), huggingface.apply(model), inputs)


def test_signature_name_and_parameters_are_kept(model):
    plain = copy.deepcopy(model)
    fused = huggingface.apply(model)
    assert isinstance(fused, type(plain))
    assert type(fused).__name__ == type(plain).__name__
    mine, right = (inspect.signature(m.forward).parameters for m in (fused, plain))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in right.values()]
    assert [*dict(fused.named_parameters())] == [*dict(plain.named_parameters())]
    assert type(huggingface.revert(fused)) is type(plain)


def test_outputs_beside_the_loss(model):
    inputs = batch() | {"output_hidden_states": True}
    expected = copy.deepcopy(model).eval()(**inputs)
    out = huggingface.apply(model).eval()(**inputs)
    assert list(out) == list(expected) == ["loss", "logits", "hidden_states"]
    assert torch.equal(out.logits, expected.logits)
    assert all(map(torch.equal, out.hidden_states, expected.hidden_states))
    assert model.train()(**inputs).logits is None
    assert [type(part) for part in model(**inputs, return_dict=False)] == [torch.Tensor, torch.Tensor, tuple]
    del inputs["labels"]
    assert torch.equal(model.eval()(**inputs).logits, expected.logits)


def test_saved_models_are_ordinary(model, tmp_path):
    original, inputs = type(model), batch()
    expected = huggingface.apply(model).eval()(**inputs).loss
    model.save_pretrained(tmp_path)
    loaded = original.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == [original.__name__]
    torch.testing.assert_close(loaded(**inputs).loss, expected)


def test_autocast(model):
    inputs = batch()
    expected = model.eval()(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = huggingface.apply(model)(**inputs).loss
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= 1e-2


def test_heads_go_there_and_back(model):
    head, plain = huggingface.read_mlm_head(model), huggingface.HuggingFaceHead.of(model)
    assert head.weight is plain.decoder.weight
    hidden_states = torch.randn(2, 5, 32)
    torch.testing.assert_close(head.logits(hidden_states), plain.logits(hidden_states))
    if isinstance(model, ModernBertForMaskedLM):
        with pytest.raises(ValueError, match=r"expected dense.bias of shape \(32,\) as in head, got None"):
            huggingface.write_mlm_head(head, model)
        return
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)
    huggingface.write_mlm_head(head, model)
    torch.testing.assert_close(head.logits(hidden_states), plain.logits(hidden_states))


def test_admin_norm_where_sub_layers_end_like_berts():
    model = make("electra", hidden_dropout_prob=0.0)
    plain, fused = copy.deepcopy(model), huggingface.apply(model, admin_norm=True)
    assert sum(name.endswith("omega") for name, _ in fused.named_parameters()) == 4
    assert_alike(plain, fused, batch())
    for family in ("distilbert", "modernbert"):
        other = make(family)
        with pytest.raises(ValueError, match=r"admin_norm: expected a post-LN model .* got (DistilBert|ModernBert)"):
            huggingface.apply(other, admin_norm=True)
        assert type(other) is FAMILIES[family][0]  # nothing was changed


def test_flattened_batches_of_modernbert():
    """Sequences one after the other in one row, as DataCollatorWithFlattening makes them. (Only flash attention keeps
    them apart, with or without us.)"""
    words = [torch.randint(5, 99, (n,)).tolist() for n in (7, 3, 9)]
    rows = [{"input_ids": ids, "labels": [t if t % 3 == 0 else -100 for t in ids]} for ids in words]
    flat = DataCollatorWithFlattening(return_position_ids=True)(rows)
    assert flat["input_ids"].shape == (1, 19)
    model = make("modernbert", attention_dropout=0.0)
    assert_alike(copy.deepcopy(model), huggingface.apply(model), dict(flat))


def test_accumulated_batches_of_modernbert_count_their_masks_together():
    model, inputs = make("modernbert"), batch()
    for items in (17, torch.tensor(17)):
        more = inputs | {"num_items_in_batch": items}
        assert_alike(copy.deepcopy(model), huggingface.apply(copy.deepcopy(model)), more)


def test_sparse_prediction_of_modernbert():
    model, inputs = make("modernbert", sparse_prediction=True), batch()
    expected = copy.deepcopy(model).eval()(**inputs)
    out = huggingface.apply(model).eval()(**inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits)
