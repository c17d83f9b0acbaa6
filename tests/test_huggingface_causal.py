"""Causal language models of transformers with the fused head and loss: their unpatched selves."""

import copy
import inspect
import pickle

import pytest
import torch
from helpers import relative_error
from huggingface_cases import SIZES, loss_and_gradients, tiny

transformers = pytest.importorskip("transformers")

from repdeg_fast import linear_cross_entropy  # noqa: E402
from repdeg_fast.integrations import huggingface  # noqa: E402
from repdeg_fast.integrations.huggingface import causal_lm  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CAPPED = GROUPED | {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}
OF_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "bos_token_id": 2, "eos_token_id": 2}
FAMILIES = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": {"num_key_value_heads": 2},
    "Qwen3ForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": CAPPED,
    "Gemma3ForCausalLM": CAPPED,
    "GPT2LMHeadModel": OF_GPT2,
    "GPTNeoXForCausalLM": {},
    "PhiForCausalLM": {},
}


def make(family, **changes):
    cls = getattr(transformers, family)
    return tiny(cls, cls.config_class, **{"num_hidden_layers": 1, "eos_token_id": 2} | FAMILIES[family] | changes)


def batch(rows=3, columns=8):
    words = torch.randint(5, 99, (rows, columns))
    return {"input_ids": words, "labels": words.masked_fill(torch.rand(rows, columns) > 0.8, -100)}


def assert_alike(plain, fused, inputs):
    """Loss and every gradient, in float64; transformers' own loss is in float32."""
    expected, right = loss_and_gradients(plain.double().train(), inputs)
    loss, gradients = loss_and_gradients(fused.double().train(), inputs)
    assert fused(**inputs).logits is None
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0)
    for name in right:
        assert relative_error(gradients[name], right[name]) <= 1e-6


def test_every_family_is_here():
    assert {cls.__name__ for cls in causal_lm.FUSED_CAUSAL} == set(FAMILIES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, tied):
    model = make(family, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = batch() | {"attention_mask": (torch.arange(8) < torch.tensor([[8], [5], [7]])).long()}
    assert_alike(copy.deepcopy(model), huggingface.apply(model), inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_is_the_models_own(family):
    """Signature and name, evaluation, outputs beside the loss, generation."""
    model, inputs = make(family), batch()
    plain, fused = copy.deepcopy(model).eval(), huggingface.apply(model).eval()
    assert (type(fused).__name__, isinstance(fused, type(plain))) == (family, True)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    assert [*dict(fused.named_parameters())] == [*dict(plain.named_parameters())]
    for given in (inputs, {"input_ids": inputs["input_ids"], "logits_to_keep": 2}):
        mine, right = fused(**given), plain(**given)
        assert list(mine) == list(right)
        assert torch.equal(mine.logits, right.logits)
    asked = inputs | {"use_cache": True, "output_hidden_states": True}
    alone, right = fused(**asked, skip_logits=True), plain(**asked)
    assert list(alone) == [name for name in right if name != "logits"]
    torch.testing.assert_close(alone.loss, right.loss)
    assert all(map(torch.equal, alone.hidden_states, right.hidden_states))
    grown = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    words = inputs["input_ids"]
    assert torch.equal(fused.generate(words, **grown), plain.generate(words, **grown))
    assert type(huggingface.revert(fused)) is type(plain)


@pytest.fixture
def model():
    return make("LlamaForCausalLM")


def test_options_of_the_loss(model):
    """Items of several batches, labels that are shifted already, another index to ignore; positions as arguments."""
    plain, fused, inputs = copy.deepcopy(model), huggingface.apply(model), batch()
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    for more in (
        {"num_items_in_batch": 17},
        {"num_items_in_batch": torch.tensor(17)},
        {"shift_labels": shifted},
        {"ignore_index": 7, "labels": inputs["labels"].masked_fill(inputs["labels"] == -100, 7)},
    ):
        assert_alike(copy.deepcopy(plain), copy.deepcopy(fused), inputs | more)
    with torch.no_grad():
        mine = fused(inputs["input_ids"], None, None, None, None, inputs["labels"])
    torch.testing.assert_close(mine.loss, plain(**inputs).loss)


def test_logits_beside_a_loss(model):
    inputs = batch()
    fused = huggingface.apply(model, logits="always").train()
    assert fused(**inputs).logits.shape == (3, 8, 99)
    assert huggingface.apply(model, logits="never").eval()(**inputs).logits is None
    huggingface.apply(model)
    assert [part.shape for part in fused.train()(**inputs, return_dict=False)[:2]] == [(), (3, 8, 99)]
    with pytest.raises((ValueError, RuntimeError)):  # as without us: labels of other positions than the logits
        fused(**inputs, logits_to_keep=3)


def test_what_is_not_fused_is_the_models_own(model):
    """A loss function or a head that is not what it was."""
    inputs = batch()
    fused = huggingface.apply(model).train()
    fused.loss_function = lambda logits, labels, **_: logits.sum()
    assert fused(**inputs).logits is not None
    assert huggingface.describe(fused).parts[0][1:] == (False, "the model has a loss function of its own")
    del fused._loss_function
    fused.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    assert fused(**inputs).logits is not None
    assert "not a plain nn.Linear" in str(huggingface.describe(fused))


def test_copies_pickles_and_saved_models(model, tmp_path):
    inputs = batch()
    fused = huggingface.apply(model).train()
    expected = fused(**inputs).loss
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other(**inputs).logits is None
        assert torch.equal(other(**inputs).loss, expected)
    fused.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(loaded(**inputs).loss, expected)


def test_autocast_and_compilation(model):
    inputs = batch()
    expected = model.train()(**inputs).loss
    fused = huggingface.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(**inputs).loss
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= 1e-2
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, expected)


def test_report_and_switches(capsys):
    bert = tiny(transformers.BertForMaskedLM, transformers.BertConfig, hidden_dropout_prob=0.0)
    plain = copy.deepcopy(bert)
    huggingface.apply(bert, loss=False, admin_norm=True, report=True)
    printed = capsys.readouterr().out
    assert type(bert) is transformers.BertForMaskedLM
    assert "repdeg_fast in BertForMaskedLM" in printed
    assert "head and loss    left: apply(model, loss=True)" in printed
    assert "replaced: dropout, sum and LayerNorm of 4 sub-layers" in printed
    assert [part.replaced for part in huggingface.describe(huggingface.revert(bert)).parts] == [False] * 4
    huggingface.apply(bert)
    head, blocks = huggingface.describe(bert).parts[:2]
    assert head == (
        "head and loss",
        True,
        "one linear cross entropy, logits beside a loss in eval mode and in tuples only",
    )
    assert blocks == ("residual blocks", False, "4 sub-layers that apply(model, admin_norm=True) would take over")
    assert type(huggingface.apply(bert, loss=False)) is type(plain)
    model = make("LlamaForCausalLM")
    huggingface.apply(model, logits="always")
    assert "logits are wanted beside every loss" in str(huggingface.describe(model))
    assert "not post-LN" in str(huggingface.describe(model))
    with pytest.raises(ValueError, match="admin_norm: expected a post-LN model"):
        huggingface.apply(model, admin_norm=True)
    with pytest.raises(TypeError, match=r"model: expected one of .*LlamaForCausalLM.* got MixtralForCausalLM"):
        huggingface.apply(transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_key_value_heads=2)))


def test_the_loss_is_the_shifted_cross_entropy(model):
    inputs = batch()
    fused = huggingface.apply(model).train()
    hidden = fused.model(input_ids=inputs["input_ids"]).last_hidden_state
    mine = linear_cross_entropy(hidden, fused.lm_head.weight, inputs["labels"], shift=True)
    assert torch.equal(fused(**inputs).loss, mine)
