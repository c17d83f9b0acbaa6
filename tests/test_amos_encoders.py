"""AMOS on other encoders: the authors' (relative positions, no token types), whose checkpoints are read; ModernBERT,
with packed batches."""

import math

import pytest
import torch
from helpers import relative_error
from torch.nn import functional as F

from repdeg_fast.reference import philox

transformers = pytest.importorskip("transformers")
from transformers import ModernBertConfig, ModernBertModel  # noqa: E402

from repdeg_fast.models.amos import AmosBertModel, AmosConfig, AmosForPreTraining, from_published  # noqa: E402
from repdeg_fast.models.amos.encoders import relative_position_bucket  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
V, WIDTH, HEADS, LAYERS, POSITIONS, MASK = 53, 16, 2, 3, 24, 4
MLM_LAYERS = (1, 2)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def batch(rows=3, columns=11, padded=True):
    words = torch.randint(5, V, (rows, columns))
    attention_mask = torch.ones_like(words)
    if padded:
        attention_mask[1, -4:] = 0
    masked = (torch.rand(rows, columns) < 0.4) & (attention_mask == 1)
    inputs = words.masked_fill(masked, MASK).masked_fill(attention_mask == 0, 0)
    return {"input_ids": inputs, "attention_mask": attention_mask, "labels": words.masked_fill(~masked, -100)}


# ---- the authors' encoders, in their words


def fairseq_checkpoint(buckets=32):
    """Random, by the names that the authors' code has."""
    state = {}

    def linear(name, rows, columns):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(rows, columns), torch.randn(rows)

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(WIDTH), torch.randn(WIDTH)

    words = torch.randn(V, WIDTH)
    for encoder, layers in (("encoder", LAYERS), ("auxiliary", max(MLM_LAYERS))):
        prefix = f"{encoder}.sentence_encoder"
        state[f"{prefix}.embed_tokens.weight"] = words
        state[f"{prefix}.embed_positions.weight"] = torch.randn(POSITIONS, WIDTH)
        state[f"{prefix}.relative_attention_bias.weight"] = torch.randn(buckets, HEADS)
        norm(f"{prefix}.emb_layer_norm")
        for layer in range(layers):
            part = f"{prefix}.layers.{layer}"
            linear(f"{part}.self_attn.in_proj", 3 * WIDTH, WIDTH)
            linear(f"{part}.self_attn.out_proj", WIDTH, WIDTH)
            linear(f"{part}.fc1", 2 * WIDTH, WIDTH)
            linear(f"{part}.fc2", WIDTH, 2 * WIDTH)
            norm(f"{part}.self_attn_layer_norm")
            norm(f"{part}.final_layer_norm")
    linear("auxiliary.lm_head.dense", WIDTH, WIDTH)
    norm("auxiliary.lm_head.layer_norm")
    state |= {"auxiliary.lm_head.weight": words, "auxiliary.lm_head.bias": torch.randn(V)}
    state["auxiliary.lm_head.layer_mixture.weight"] = torch.randn(1, WIDTH)
    linear("encoder.binary_head.out_proj", 1, WIDTH)
    return {name: 0.3 * tensor.double() for name, tensor in state.items()}


def bucket(distance, buckets=32, most=128):
    """One of one distance: exact below a quarter, then by the logarithm, with the sign."""
    half, n = buckets // 2, abs(distance)
    exact = half // 2
    if n >= exact:
        n = min(half - 1, exact + math.ceil(math.log(n / exact) / math.log((most - 1) / exact) * (half - 1 - exact)))
    return int(math.copysign(n, distance)) + half - 1


def encode(state, prefix, embeddings, attention_mask):
    """The states after every layer."""
    p = {name.removeprefix(f"{prefix}.sentence_encoder."): t for name, t in state.items() if name.startswith(prefix)}
    length = embeddings.shape[1]
    norm = lambda name, x: F.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)  # noqa: E731
    linear = lambda name, x: F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    buckets = torch.tensor([[bucket(j - i) for j in range(length)] for i in range(length)])
    bias = p["relative_attention_bias.weight"][buckets].permute(2, 0, 1)
    bias = bias.masked_fill((attention_mask == 0)[:, None, None], -math.inf)
    x, states = norm("emb_layer_norm", embeddings + p["embed_positions.weight"][:length]), []
    for layer in range(sum(name.endswith("fc1.weight") for name in p)):
        part = f"layers.{layer}"
        q, k, v = (
            t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in linear(f"{part}.self_attn.in_proj", x).chunk(3, 2)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + bias).softmax(3)
        attended = linear(f"{part}.self_attn.out_proj", (weights @ v).transpose(1, 2).flatten(2))
        x = norm(f"{part}.self_attn_layer_norm", x + attended)
        x = norm(f"{part}.final_layer_norm", x + linear(f"{part}.fc2", F.gelu(linear(f"{part}.fc1", x))))
        states.append(x)
    return states


def test_a_published_checkpoint_gives_what_the_authors_code_gives():
    state, inputs = fairseq_checkpoint(), batch()
    model = from_published(state, mlm_layers=MLM_LAYERS, **NO_DROPOUT).double()
    model.load_state_dict(from_published(state, mlm_layers=MLM_LAYERS).state_dict())  # not through float32
    model.mlm_head.bias.data = state["auxiliary.lm_head.bias"].clone()
    for name, tensor in model.named_parameters():
        assert tensor.dtype == torch.float64, name
    output = model.eval()(**inputs, seed=3)

    masked = inputs["labels"] != -100
    words = state["encoder.sentence_encoder.embed_tokens.weight"]
    states = encode(state, "auxiliary", words[inputs["input_ids"]], inputs["attention_mask"])
    head = {name.removeprefix("auxiliary.lm_head."): t for name, t in state.items()}
    logits, scores = [], []
    for layer in MLM_LAYERS:
        features = states[layer - 1][masked]
        x = F.gelu(F.linear(features, head["dense.weight"], head["dense.bias"]))
        x = F.layer_norm(x, (WIDTH,), head["layer_norm.weight"], head["layer_norm.bias"], 1e-5)
        logits.append(F.linear(x, words, head["bias"]))
        scores.append(features @ head["layer_mixture.weight"][0])
    losses = torch.stack([F.cross_entropy(one, inputs["labels"][masked]) for one in logits])
    alpha = torch.stack(scores, 1).softmax(1)
    mixed = torch.einsum("mk,mkv->mv", alpha, torch.stack(logits, 1))
    samples = (mixed + philox.gumbel(torch.tensor([3]), range(len(mixed)), range(V), dtype=mixed.dtype)).argmax(1)
    read = inputs["input_ids"].masked_scatter(masked, samples)
    last = encode(state, "encoder", words[read], inputs["attention_mask"])[-1]
    original = last @ state["encoder.binary_head.out_proj.weight"][0] + state["encoder.binary_head.out_proj.bias"]

    assert relative_error(output.mlm_losses, losses) < 1e-6  # parameters were in float32 once
    assert torch.equal(output.sampled_ids, read)
    real = inputs["attention_mask"] == 1
    assert relative_error(output.rtd_logits[real], -original[real]) < 1e-5
    assert relative_error(output.mixture_weights, alpha.mean(0)) < 1e-6


def test_buckets_are_the_published_ones():
    distances = torch.arange(-600, 601)
    for buckets, most in ((32, 128), (8, 16)):
        found = relative_position_bucket(distances, buckets, most)
        assert found.tolist() == [bucket(int(d), buckets, most) for d in distances]
        assert found.min() == 0
        assert found.max() == buckets - 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("auxiliary.lm_head.dense.weight"), "expected tensors for mlm_head.dense.weight, got none"),
        (
            lambda s: s.pop("encoder.sentence_encoder.embed_positions.weight"),
            "expected the tensors of the authors' AMOS, found no .*embed_positions",
        ),
        (lambda s: s.update({"encoder.lost": torch.ones(2)}), "expected no place for encoder.lost"),
        (lambda s: s.pop("encoder.binary_head.out_proj.bias"), "expected tensors for rtd_head.bias, got none"),
        (
            lambda s: s.update({"auxiliary.lm_head.bias": torch.ones(3)}),
            r"expected shape \(53,\) for mlm_head.bias, got \(3,\)",
        ),
    ],
)
def test_checkpoints_that_are_none(change, message):
    state = fairseq_checkpoint()
    change(state)
    with pytest.raises(ValueError, match=f"state_dict: {message}"):
        from_published(state, mlm_layers=MLM_LAYERS)


def test_what_is_no_checkpoint():
    for given, message in (
        ("checkpoint.pt", "expected names and tensors, got str; torch.load a file"),
        ({"model": {}}, "expected tensors, got dict as 'model': pass that entry"),
        ({"encoder": 3}, "expected tensors, got int as 'encoder'"),
    ):
        with pytest.raises(TypeError, match=f"state_dict: {message}"):
            from_published(given)


def published(**options):
    sizes = {"vocab_size": V, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    sizes |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": POSITIONS, "mlm_layers": MLM_LAYERS}
    return AmosForPreTraining(AmosConfig.published(**sizes | NO_DROPOUT | options))


def test_the_bias_learns_and_its_encoder_loads_by_itself(tmp_path):
    model, inputs = published(), batch()
    assert model.config.layer_norm_eps == 1e-5
    assert not [name for name, _ in model.named_parameters() if "token_type" in name]
    model(**inputs, seed=1).loss.backward()
    for encoder in (model.discriminator, model.generator):
        assert encoder.relative_positions.weight.grad.abs().sum() > 0
    encoder = model.eval().discriminator_encoder()
    assert isinstance(encoder, AmosBertModel)
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "encoder")
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model(**words).rtd_logits
    torch.testing.assert_close(model.rtd_head(loaded.eval()(**words).last_hidden_state).squeeze(2), expected)
    model.save_pretrained(tmp_path / "amos")
    again = AmosForPreTraining.from_pretrained(tmp_path / "amos").eval()
    assert torch.equal(again(**inputs, seed=1).loss, model(**inputs, seed=1).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_autocast_with_the_bias(reentrant):
    model, inputs = published().train(), batch()

    def gradients():
        model.zero_grad()
        loss = model(**inputs, seed=1).loss
        loss.backward()
        return loss, model.generator.relative_positions.weight.grad.clone()

    loss, gradient = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again, checkpointed = gradients()
    assert torch.equal(again, loss)
    torch.testing.assert_close(checkpointed, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(**inputs, seed=1).mlm_losses, model(**inputs, seed=1).mlm_losses) < 1e-2


# ---- ModernBERT


def modern(**options):
    special = {"pad_token_id": 0, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)}
    config = ModernBertConfig(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=4, num_attention_heads=HEADS,
        max_position_embeddings=64, local_attention=8, global_attn_every_n_layers=3, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AmosForPreTraining(AmosConfig(backbone=config, mlm_layers=(1, 3), **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def test_modern_bert_equals_the_formula():
    model, inputs = modern().eval(), batch()
    output = model(**inputs, seed=5)
    masked, words = inputs["labels"] != -100, model.discriminator.embeddings.tok_embeddings.weight
    shared = {"attention_mask": inputs["attention_mask"]}
    states = {}
    for depth in (1, 3):  # the generator cut there is an encoder of its own
        config = model.config.generator_config()
        config.num_hidden_layers, config.layer_types = depth, config.layer_types[:depth]
        cut = ModernBertModel(config).double().eval()
        cut.load_state_dict(model.generator.state_dict(), strict=False)
        states[depth] = cut(inputs["input_ids"], **shared).last_hidden_state[masked]
    head, logits = model.mlm_head, []
    for hidden in states.values():
        logits.append(F.linear(head.layer_norm(F.gelu(head.dense(hidden))), words, head.bias))
        torch.testing.assert_close(
            output.mlm_losses[len(logits) - 1], F.cross_entropy(logits[-1], inputs["labels"][masked])
        )
    alpha = torch.stack([model.mixture.score(hidden)[:, 0] for hidden in states.values()], 1).softmax(1)
    mixed = torch.einsum("mk,mkv->mv", alpha, torch.stack(logits, 1))
    samples = (mixed + philox.gumbel(torch.tensor([5]), range(len(mixed)), range(V), dtype=mixed.dtype)).argmax(1)
    read = inputs["input_ids"].masked_scatter(masked, samples)
    assert torch.equal(output.sampled_ids, read)
    answer = model.rtd_head(model.discriminator(read, **shared).last_hidden_state).squeeze(2)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(output.rtd_logits[real], answer[real])
    assert model.generator.embeddings.tok_embeddings.weight is words


def test_sequences_packed_into_a_row_give_what_rows_give():
    model, inputs = modern(), batch(padded=True)
    lengths = inputs["attention_mask"].sum(1).tolist()
    packed = {
        name: torch.cat([row[:n] for row, n in zip(inputs[name], lengths, strict=True)])[None]
        for name in ("input_ids", "labels")
    }
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]

    def step(given):
        model.zero_grad()
        output = model(**given, seed=2)
        output.loss.backward()
        return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    (rows, right), (row, found) = step(inputs), step(packed)
    torch.testing.assert_close(row.loss, rows.loss)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(row.rtd_logits[0], rows.rtd_logits[real])
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
    ones = torch.ones_like(packed["input_ids"])  # which other collators add
    torch.testing.assert_close(model(**packed, attention_mask=ones, seed=2).loss, rows.loss)


def test_modern_bert_is_saved_and_its_discriminator_is_plain(tmp_path):
    model, inputs = modern().float().eval(), batch()
    expected = model(**inputs, seed=1)
    model.save_pretrained(tmp_path / "amos")
    again = AmosForPreTraining.from_pretrained(tmp_path / "amos").eval()
    assert type(again.config.backbone) is ModernBertConfig
    assert torch.equal(again(**inputs, seed=1).loss, expected.loss)
    model.discriminator_encoder().save_pretrained(tmp_path / "encoder")
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "encoder")) is ModernBertModel


def test_the_generator_of_modern_bert_has_no_dropout_unless_asked_for():
    assert modern().config.generator_config().attention_dropout == 0
    config = ModernBertConfig(attention_dropout=0.2, mlp_dropout=0.1, num_hidden_layers=4)
    assert AmosConfig(backbone=config, mlm_layers=(1, 2)).generator_config().mlp_dropout == 0
    kept = AmosConfig(backbone=config, mlm_layers=(1, 2), generator_dropout=True).generator_config()
    assert (kept.attention_dropout, kept.mlp_dropout, kept.num_hidden_layers) == (0.2, 0.1, 2)
    assert len(kept.layer_types) == 2
    assert config.attention_dropout == 0.2


def test_ranks_are_weighted_by_their_masked_positions(monkeypatch):
    model, inputs = published().train(), batch()
    plain, wanted = model(**inputs, seed=1), model.config.rtd_weight
    own, read = int((inputs["labels"] != -100).sum()), int(inputs["attention_mask"].sum())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)

    def all_gather(parts, mine, group):
        assert mine.tolist() == [own, read]
        parts[0].copy_(mine)
        parts[1].copy_(torch.tensor([own + 7, 3 * read]))

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    mlm, rtd = plain.mlm_losses.sum() * (2 * own / (2 * own + 7)), plain.rtd_loss * 0.5
    torch.testing.assert_close(model(**inputs, seed=1).loss, mlm + wanted * rtd)
    torch.testing.assert_close(model.eval()(**inputs, seed=1).loss, plain.loss)


def test_bad_backbones():
    with pytest.raises(TypeError, match=r"backbone: expected a configuration of BertConfig, .* got GPT2Config"):
        AmosConfig(backbone=transformers.GPT2Config())
    with pytest.raises(ValueError, match="token_type_ids: expected None, ModernBertModel takes none"):
        modern()(**batch(), token_type_ids=torch.zeros(3, 11, dtype=torch.int64))
    for options, message in (
        ({"relative_position_buckets": 7}, "relative_position_buckets: expected 0, or an even number of at least 4"),
        ({"relative_position_distance": 9}, "relative_position_distance: expected more than a quarter of the 32"),
    ):
        with pytest.raises(ValueError, match=message):
            published(**options)
    model = published()
    model.discriminator.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation: expected sdpa or eager, whose attention takes a bias"):
        model(**batch())
