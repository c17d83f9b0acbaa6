"""Condenser and coCondenser against the published computation, written out; files that others load; bad input."""

import copy
import json

import pytest
import torch
from helpers import relative_error
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM  # noqa: E402

from repdeg_fast.integrations import huggingface  # noqa: E402
from repdeg_fast.models.condenser import CoCondenserForPreTraining, CondenserForPreTraining  # noqa: E402
from repdeg_fast.training import cached_backward, split_batch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 20, "pad_token_id": 1}
MODELS = {"bert": (BertForMaskedLM, BertConfig), "roberta": (RobertaForMaskedLM, RobertaConfig)}


def language_model(family="bert", **changes):
    cls, config = MODELS[family]
    model = cls(config(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero biases
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def batch(rows=4, columns=9):
    words = torch.randint(5, 67, (rows, columns))
    masked = torch.rand(rows, columns) < 0.4
    masked[:, 0], masked[0, 1] = False, True
    lengths = torch.tensor([columns, columns - 2, columns, columns - 4, columns, 3])[:rows, None]
    attended = torch.arange(columns) < lengths
    labels = words.masked_fill(~(masked & attended), -100)
    return {"input_ids": words.masked_fill(~attended, 1), "attention_mask": attended.long(), "labels": labels}


def published(model, inputs, *, contrastive=False, dtype=torch.float64):
    """Loss as the paper's code has it: additive mask, whole logits, whole similarities. On the same random numbers."""
    labels = inputs["labels"]
    out = model.model(**inputs, output_hidden_states=True, return_dict=True)
    mask = (1 - inputs["attention_mask"][:, None, None].to(dtype)) * torch.finfo(dtype).min
    hidden = torch.cat([out.hidden_states[-1][:, :1], out.hidden_states[model.skip_from][:, 1:]], dim=1)
    for layer in model.head:
        hidden = layer(hidden, mask)
    lm_head = model.model.cls if hasattr(model.model, "cls") else model.model.lm_head
    loss = F.cross_entropy(lm_head(hidden).flatten(0, 1), labels.flatten())
    loss = loss + (out.loss if model.late_mlm else 0)
    if contrastive:
        cls = out.hidden_states[-1][:, 0]
        similarities = (cls @ cls.T).fill_diagonal_(-torch.inf)
        target = torch.arange(len(cls)).view(-1, 2).flip([1]).flatten()
        loss = loss + F.cross_entropy(similarities, target)
    return loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("skip_from", "late_mlm", "n_head_layers"), [(2, False, 2), (0, True, 1), (3, True, 2)])
@pytest.mark.parametrize("cls", [CondenserForPreTraining, CoCondenserForPreTraining])
def test_equals_the_published_computation(cls, family, skip_from, late_mlm, n_head_layers):
    model = cls(language_model(family), n_head_layers=n_head_layers, skip_from=skip_from, late_mlm=late_mlm).eval()
    inputs = batch()
    output = model(**inputs)
    expected = published(model, inputs, contrastive=cls is CoCondenserForPreTraining)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    parts = [output.head_loss, output.late_loss, output.contrastive_loss]
    torch.testing.assert_close(sum(part for part in parts if part is not None), output.loss)
    assert (output.late_loss is not None) == late_mlm
    mine, right = gradients(model, output.loss), gradients(model, published(
        model, inputs, contrastive=cls is CoCondenserForPreTraining
    ))  # fmt: skip
    assert mine.keys() == right.keys()
    for name in right:
        assert relative_error(mine[name], right[name]) < 1e-9 or right[name].norm() < 1e-12, name


def test_the_patched_model_and_dropout_give_the_same():
    plain = CondenserForPreTraining(language_model(), late_mlm=True).train()
    fused = copy.deepcopy(plain)
    huggingface.apply(fused.model)
    inputs = batch()
    losses = []
    for model in (plain, fused):
        torch.manual_seed(3)
        losses.append(model(**inputs).loss)
    assert torch.equal(*losses)
    torch.manual_seed(3)
    torch.testing.assert_close(published(plain, inputs), losses[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_cached_equals_uncached_with_dropout(chunk_size):
    """Chunks of one, and of unequal numbers of masks; dropout drawn chunk by chunk in both."""
    model = CoCondenserForPreTraining(language_model(), late_mlm=True).train()
    inputs = batch()
    torch.manual_seed(7)
    losses = cached_backward(model.encoded, model.contrastive_loss, inputs, chunk_size=chunk_size)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(7)
    parts = [model.encoded(chunk) for chunk in split_batch(inputs, chunk_size)]
    masks = sum(part.count for part in parts)
    mlm = sum(part.loss * part.count for part in parts if part.count) / masks
    loss = mlm + model.contrastive_loss(torch.cat([part.embeddings for part in parts]))
    torch.testing.assert_close(losses.loss, loss.detach())
    right = gradients(model, loss)
    assert found.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-8, atol=1e-11)


def test_ranks_see_each_other_and_count_once_each(monkeypatch):
    """Of two ranks, made one after the other here: the mean of their gradients is that of one batch of both."""
    model = CoCondenserForPreTraining(language_model()).eval()
    everything = batch(rows=6)
    shares = [{name: value[:2] for name, value in everything.items()}, {k: v[2:4] for k, v in everything.items()}]
    everything = {name: value[:4] for name, value in everything.items()}
    cls = [model(**share).cls for share in shares]
    expected = torch.autograd.grad(model.contrastive_loss(torch.cat(cls)), model.model.bert.parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)

    def all_gather(parts, own):
        for part, rows in zip(parts, cls, strict=True):
            part.copy_(rows.detach())

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    sums = [torch.zeros_like(p) for p in model.model.bert.parameters()]
    for rank, share in enumerate(shares):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        loss = model(**share).contrastive_loss
        for total, grad in zip(sums, torch.autograd.grad(loss, model.model.bert.parameters()), strict=True):
            total += grad / 2
    for total, right in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, right)


def test_the_head_begins_as_the_model_begins_its_layers():
    model = CondenserForPreTraining(
        BertForMaskedLM(BertConfig(**SIZES | {"hidden_size": 128, "initializer_range": 0.3}))
    )
    head, own = (list(layers[0].parameters()) for layers in (model.head, model.model.bert.encoder.layer))
    for mine, theirs in zip(head, own, strict=True):
        torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.1, atol=0)
        torch.testing.assert_close(mine.mean(), theirs.mean(), rtol=0.1, atol=0.02)
    assert not torch.equal(head[0], own[0])


def test_without_labels_there_is_no_loss():
    model = CoCondenserForPreTraining(language_model()).eval()
    assert (model.device, model.config) == (model.model.device, model.model.config)
    inputs = batch(rows=3)
    inputs.pop("labels")
    output = model(**inputs)
    assert output.loss is None
    assert torch.equal(output.last_hidden_state, model.model.base_model(**inputs).last_hidden_state)
    assert torch.equal(output.cls, output.last_hidden_state[:, 0])
    assert output.hidden_states is None
    found = model(**inputs, output_hidden_states=True, return_dict=True).hidden_states
    for mine, right in zip(found, model.model(**inputs, output_hidden_states=True).hidden_states, strict=True):
        assert torch.equal(mine, right)
    with pytest.raises(ValueError, match="return_dict: expected True, got False"):
        model(**inputs, return_dict=False)


def test_a_batch_without_masks_has_loss_zero():
    model = CondenserForPreTraining(language_model())
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reaches_the_head(reentrant):
    model = CondenserForPreTraining(language_model()).train()
    inputs = batch()
    torch.manual_seed(5)
    expected = gradients(model, model(**inputs).loss)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.head)
    torch.manual_seed(5)
    found = gradients(model, model(**inputs).loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    model.activation_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.head)


def test_saved_encoders_are_plain_and_the_head_comes_back(tmp_path):
    model = CondenserForPreTraining(language_model(), n_head_layers=1, skip_from=1, late_mlm=True).eval()
    inputs = batch()
    model.save_pretrained(tmp_path)
    again = CondenserForPreTraining.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    encoder, report = transformers.AutoModel.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float64, add_pooling_layer=False
    )
    assert not report["missing_keys"]
    inputs.pop("labels")
    assert torch.equal(encoder.eval()(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    with pytest.raises(ValueError, match=r"n_head_layers: expected 1, as the head in .* has, got 2"):
        CondenserForPreTraining.from_pretrained(tmp_path, n_head_layers=2)
    assert CondenserForPreTraining.from_pretrained(tmp_path, skip_from=2, dtype=torch.float64).skip_from == 2


def test_a_missing_head_is_said_loudly(tmp_path):
    model = CoCondenserForPreTraining(language_model())
    model.model.save_pretrained(tmp_path)
    with pytest.warns(
        RuntimeWarning, match=r"has no condenser_head.safetensors: Condenser's head is new and untrained"
    ):
        CoCondenserForPreTraining.from_pretrained(tmp_path)
    (tmp_path / "condenser.json").write_text(json.dumps({"n_head_layers": 2, "skip_from": 2, "late_mlm": False}))
    with pytest.raises(FileNotFoundError, match=r"condenser_head.safetensors: expected the head that condenser.json"):
        CoCondenserForPreTraining.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "condenser.json").write_text(json.dumps({"n_head_layers": 3, "skip_from": 2, "late_mlm": False}))
    with pytest.raises(ValueError, match=r"condenser_head.safetensors: expected the 3 layers of condenser.json in the"):
        CoCondenserForPreTraining.from_pretrained(tmp_path)
    (tmp_path / "condenser.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"condenser.json: expected the settings of the head in condenser_head"):
        CoCondenserForPreTraining.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_head_layers": 0}, ValueError, "n_head_layers: .*got 0"),
        (
            {"skip_from": 4},
            ValueError,
            r"skip_from: expected a layer of the encoder, from 0 \(embeddings\) to 3, got 4",
        ),
        ({"skip_from": -1}, ValueError, "skip_from: expected a layer of the encoder"),
        ({"skip_from": 1.5}, TypeError, "skip_from: "),
        ({"late_mlm": "yes"}, TypeError, "late_mlm: "),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        CondenserForPreTraining(language_model(), **options)


def test_bad_models_and_batches():
    with pytest.raises(TypeError, match=r"model: expected a masked-language model, .* got BertModel"):
        CondenserForPreTraining(language_model().bert)
    model, inputs = CoCondenserForPreTraining(language_model()), batch(rows=3)
    with pytest.raises(ValueError, match="input_ids: expected an even number of rows, two spans a text, got 3"):
        model(**inputs)
    inputs = batch()
    inputs["labels"][1, 0] = 7
    with pytest.raises(ValueError, match="labels: expected -100 at position 0, the CLS, which is never masked; got 7"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, 9\), a token a position, got \(4, 8\)"):
        model(**batch() | {"labels": torch.full((4, 8), -100)})


def test_trainer_saves_resumes_and_averages_what_it_accumulates(tmp_path):
    """Its checkpoints are state dicts, in which a tied weight stands once; gradients of two half batches are those of
    one, which they are not if the model is taken to divide by the number of items itself."""
    pytest.importorskip("accelerate")
    rows = batch(rows=4)
    data = [{name: value[i] for name, value in rows.items()} for i in range(4)]

    def trained(folder, steps, resume=None, **options):
        torch.manual_seed(0)
        model = CondenserForPreTraining(language_model().float(), late_mlm=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=1, logging_steps=1, report_to=[],
            use_cpu=True,
            disable_tqdm=True, learning_rate=1e-3, lr_scheduler_type="constant", seed=1, **options,
        )  # fmt: skip
        runner = transformers.Trainer(model, arguments, train_dataset=data)
        runner.train(resume_from_checkpoint=resume)
        return model, [entry for entry in runner.state.log_history if "loss" in entry]

    options = {"per_device_train_batch_size": 2}
    whole, _ = trained("whole", 2, **options)
    trained("broken", 1, **options)
    resumed, _ = trained("broken", 2, str(tmp_path / "broken" / "checkpoint-1"), **options)
    for (name, mine), (_, right) in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(mine, right, msg=name)
    assert resumed.model.get_output_embeddings().weight is resumed.model.get_input_embeddings().weight

    _, (once,) = trained("once", 1, per_device_train_batch_size=4)
    _, (twice,) = trained("twice", 1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert 0.6 * once["grad_norm"] < twice["grad_norm"] < 1.5 * once["grad_norm"]
    assert twice["loss"] == pytest.approx(once["loss"], rel=0.1)


def test_sentence_transformers_embeds_with_the_saved_encoder(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    model = CondenserForPreTraining(language_model(pad_token_id=0)).float().eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = st.SentenceTransformer(str(tmp_path), device="cpu")
    encoder[1].pooling_mode = "cls"
    texts = ["w3 w7 w1", "w9"]
    found = encoder.encode(texts, convert_to_tensor=True)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(found, model(**inputs).cls.detach())
