"""AMOS against its published formula written out with K logits tensors, and its options."""

import copy
import warnings

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from repdeg_fast.reference import philox

transformers = pytest.importorskip("transformers")
from amos_cases import B, T, V, amos, batch, gradients  # noqa: E402
from transformers import BertForSequenceClassification, BertModel  # noqa: E402

from repdeg_fast.models import AmosForPreTraining  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def published(model, input_ids, attention_mask, labels, seed):
    """The paper's model as its authors wrote it: K logits tensors, mixed; F.gumbel_softmax's arithmetic with the noise
    of ``seed``; a product of one-hot rows and the embedding."""
    masked = labels != -100
    extended = torch.zeros(attention_mask.shape, dtype=model.dtype).masked_fill(attention_mask == 0, -1e9)
    hidden = model.generator.embeddings(input_ids)
    weight, bias = model.discriminator.embeddings.word_embeddings.weight, model.mlm_head.bias
    logits, scores, losses = [], [], []
    for number, layer in enumerate(model.generator.encoder.layer, start=1):
        hidden = layer(hidden, extended[:, None, None])
        if number in model.config.mlm_layers:
            features = hidden[masked]
            hidden = hidden.detach()
            head = model.mlm_head
            transformed = head.layer_norm(F.gelu(head.dense(features)))
            logits.append(F.linear(transformed, weight, bias))
            scores.append(model.mixture.score(features))
            losses.append(F.cross_entropy(logits[-1], labels[masked]))
    alpha = torch.cat(scores, dim=1).softmax(dim=1)
    mixed = (torch.stack(logits, dim=2).detach() @ alpha[:, :, None]).squeeze(2)
    noise = philox.gumbel(torch.tensor([seed]), range(len(mixed)), range(V), dtype=mixed.dtype)
    soft = ((mixed + noise) / model.config.gumbel_temperature).softmax(dim=1)
    hard = F.one_hot(soft.argmax(dim=1), V).to(soft)
    sample = Reverse.apply(hard - soft.detach() + soft)
    corrupted = input_ids.clone()
    corrupted[masked] = sample.argmax(dim=1)
    embeddings = model.discriminator.embeddings.word_embeddings(corrupted)
    embeddings[masked] = sample @ weight
    states = model.discriminator(inputs_embeds=embeddings, attention_mask=attention_mask).last_hidden_state
    real = attention_mask == 1
    target = (corrupted != torch.where(masked, labels, input_ids))[real]
    answer = model.rtd_head(states[real]).squeeze(1)
    rtd_loss = F.binary_cross_entropy_with_logits(answer, target.to(answer))
    return {
        "loss": sum(losses) + 50 * rtd_loss,
        "mlm_losses": torch.stack(losses),
        "rtd_loss": rtd_loss,
        "rtd_accuracy": ((answer > 0) == target).to(answer).mean(),
        "replaced": target.to(answer).mean(),
        "mixture_weights": alpha.mean(dim=0),
        "sampled_ids": corrupted,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_published_formula(dtype):
    model = amos().to(dtype)
    for seed in range(3):
        expected = published(model, **batch(), seed=seed)
        output = model(**batch(), seed=seed)
        assert torch.equal(output.sampled_ids, expected["sampled_ids"])
        for name, value in expected.items():
            assert relative_error(output[name], value) <= TOLERANCE[dtype], name
        right, mine = gradients(model, expected["loss"]), gradients(model, output.loss)
        assert right.keys() == mine.keys() == dict(model.named_parameters()).keys()
        right["discriminator.embeddings.word_embeddings.weight"][0] = 0  # the head does not train the padding word
        for name in right:
            if "key.bias" not in name:  # rounding only: attention does not feel them
                assert relative_error(mine[name], right[name]) <= 20 * TOLERANCE[dtype], name


def test_padding_gets_no_gradient_where_it_is_sampled():
    model, inputs = amos(), batch()
    with torch.no_grad():
        model.mlm_head.bias[0] += 4
    output = model(**inputs, seed=0)
    samples = output.sampled_ids[inputs["labels"] != -100]
    assert (samples == 0).any()
    assert (samples != 0).any()
    grad = gradients(model, output.loss)["discriminator.embeddings.word_embeddings.weight"]
    assert not grad[0].any()
    assert grad[1:].any(dim=1).all()  # through the head's losses at least


def test_samples_that_equal_the_original_count_as_original():
    model = amos()
    with torch.no_grad():
        model.mlm_head.bias[7] += 1000  # now it always samples 7
    inputs = batch()
    inputs["labels"] = inputs["labels"].where(inputs["labels"] == -100, 7)
    output = model(**inputs)
    assert (output.sampled_ids[inputs["labels"] == 7] == 7).all()
    assert output.replaced == 0
    inputs["labels"] = inputs["labels"].where(inputs["labels"] == -100, 8)
    share = (inputs["labels"] == 8).sum() / inputs["attention_mask"].sum()
    torch.testing.assert_close(model(**inputs).replaced, share)


@pytest.mark.parametrize("stop", [True, False])
def test_gradient_stops_between_blocks(stop):
    model = amos(stop_gradient=stop, detach_mixture=True)
    last = gradients(model, model(**batch()).mlm_losses[2])
    below = [f"generator.encoder.layer.{n}.output.dense.weight" for n in (0, 1)]
    assert [name in last and bool(last[name].any()) for name in below] == [not stop] * 2
    assert last["generator.encoder.layer.2.output.dense.weight"].any()
    assert last["generator.encoder.layer.3.output.dense.weight"].any()


def test_generator_dropout_is_off_unless_asked_for():
    for on in (False, True):
        model = amos(generator_dropout=on, hidden_dropout_prob=0.3, mixture="equal").train()
        first, second = (model(**batch()) for _ in range(2))
        assert torch.equal(first.mlm_losses, second.mlm_losses) != on
        assert not torch.equal(first.rtd_logits, second.rtd_logits)


def test_save_and_load(tmp_path):
    model = amos().eval()
    expected = model(**batch(), seed=3)
    model.save_pretrained(tmp_path / "amos")
    loaded = AmosForPreTraining.from_pretrained(tmp_path / "amos")
    assert loaded.config.mlm_layers == (1, 2, 4)
    output = loaded(**batch(), seed=3)
    for name in expected:  # not to the bit: a loaded file may lie differently in memory
        torch.testing.assert_close(output[name], expected[name])
    tied = loaded.discriminator.embeddings.word_embeddings.weight
    assert loaded.mlm_head.weight is tied
    assert loaded.generator.embeddings.word_embeddings.weight is tied
    copied = copy.deepcopy(loaded)
    assert copied.mlm_head.weight is copied.get_input_embeddings().weight is not tied
    changed = AmosForPreTraining.from_pretrained(tmp_path / "amos", mixture="equal", gradient_scale=1.0)
    torch.testing.assert_close(changed(**batch()).mlm_losses, expected.mlm_losses)


def test_the_discriminator_is_a_plain_bert(tmp_path):
    model = amos().eval()
    encoder = model.discriminator_encoder()
    assert type(encoder) is BertModel
    assert {n: p.tolist() for n, p in encoder.named_parameters()} == {
        n: p.tolist() for n, p in model.discriminator.named_parameters()
    }
    encoder.save_pretrained(tmp_path)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    states = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)(**inputs).last_hidden_state
    torch.testing.assert_close(model.rtd_head(states).squeeze(2), model(**inputs).rtd_logits)
    classifier = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.bert.embeddings.word_embeddings.weight, model.mlm_head.weight)
    assert model.discriminator_encoder(add_pooling_layer=True).pooler is not None
    encoder.embeddings.word_embeddings.weight.data.zero_()
    assert model.mlm_head.weight.any()  # a copy


def test_new_words():
    model = amos().eval()
    before = model(**batch(), seed=0).mlm_losses
    model.resize_token_embeddings(V + 8)
    assert len(model.mlm_head.weight) == len(model.mlm_head.bias) == model.config.vocab_size == V + 8
    assert model.generator.embeddings.word_embeddings.weight is model.mlm_head.weight
    with torch.no_grad():
        model.mlm_head.bias[V:] = -1e4
    torch.testing.assert_close(model(**batch(), seed=0).mlm_losses, before)


@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    """Least of all that every layer gets gradients, also those whose input is cut off from what is below."""
    model = amos().train()
    expected = gradients(model, model(**batch(), seed=0).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mine = gradients(model, model(**batch(), seed=0).loss)
    assert expected.keys() == mine.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in mine)


def test_int32_batches():
    model, wide = amos().eval(), batch()
    expected = model(**wide, seed=0)
    output = model(**{name: value.int() for name, value in wide.items()}, seed=0)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.sampled_ids, expected.sampled_ids)


def test_autocast_in_bfloat16():
    model = amos()
    expected = model(**batch(), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch(), seed=0)
    output.loss.backward()
    assert relative_error(output.mlm_losses, expected.mlm_losses) <= TOLERANCE[torch.bfloat16]
    assert output.rtd_loss.dtype == torch.float32
    assert model.mixture.score.weight.grad.isfinite().all()


def test_a_batch_without_masks():
    model = amos()
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output = model(**inputs)
    assert torch.equal(output.mlm_losses, torch.zeros(3))
    assert torch.equal(output.sampled_ids, inputs["input_ids"])
    assert torch.equal(output.mixture_weights, torch.zeros(3))
    assert all(grad.isfinite().all() for grad in gradients(model, output.loss).values())


def test_the_host_waits_once():
    """On a GPU `nonzero` waits, and so would a value that is read back (`item`, `tolist`, `bool`)."""
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
                counted.append(function)
            return function(*args, **(kwargs or {}))

    for attention in ("sdpa", "eager"):
        model = amos(attn_implementation=attention)
        with Count():
            model(**batch()).loss.backward()
        assert counted == [torch.ops.aten.nonzero.default]
        counted.clear()


@pytest.mark.gpu
def test_one_wait_on_a_gpu():
    model = amos().cuda()
    inputs = {name: value.cuda() for name, value in batch().items()}
    model(**inputs).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


def test_positions_of_one_row_serve_all():
    model, inputs = amos(), batch()
    positions = torch.arange(T)[None]
    expected = model(**inputs, position_ids=positions.expand(B, T), seed=1)
    assert torch.equal(model(**inputs, position_ids=positions, seed=1).loss, expected.loss)
