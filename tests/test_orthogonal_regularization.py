"""Global orthogonal regularization: sentence-transformers' terms and gradients without its N × N matrix."""

import pytest
import torch
from helpers import relative_error
from torch.nn import functional as F

from repdeg_fast import global_orthogonal_regularization
from repdeg_fast.bench.suite import suites
from repdeg_fast.ops import pairwise as ops

operation = ops.operation


def embeddings(n, d, spread=0.4):
    x = torch.randn(n, d, dtype=torch.float64) + spread
    if n > 2:
        x[n // 2] = 0
    return x.requires_grad_()


def theirs():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    return losses.GlobalOrthogonalRegularizationLoss


def terms_and_gradients(loss, sets):
    terms = loss.compute_loss_from_embeddings(sets)
    return terms, torch.autograd.grad(sum(terms.values()), sets)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (2.5, None), (0.5, 3.0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (3, 50), (40, 8), (90, 24)], ids=str)
def test_equals_sentence_transformers(shape, weights, aggregation):
    from repdeg_fast.integrations.sentence_transformers import GlobalOrthogonalRegularizationLoss

    options = dict(zip(("mean_weight", "second_moment_weight"), weights, strict=True), aggregation=aggregation)
    model = torch.nn.Identity()
    sets = [embeddings(*shape), embeddings(*shape, spread=1.5)]
    found, gradients = terms_and_gradients(GlobalOrthogonalRegularizationLoss(model, **options), sets)
    expected, true_gradients = terms_and_gradients(theirs()(model, **options), sets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-10, abs=1e-14)
    for one, other in zip(gradients, true_gradients, strict=True):
        # of a zero row theirs is 1e12 times what comes from above
        kept = (one != 0).any(1)
        assert relative_error(one[kept], other[kept]) <= 1e-10


def test_apply_converts_it():
    from repdeg_fast.integrations import sentence_transformers as fused

    loss = fused.apply(theirs()(torch.nn.Identity(), aggregation="sum"))
    assert type(loss) is fused.GlobalOrthogonalRegularizationLoss
    assert loss.aggregation == "sum"


def test_one_row_is_zero_as_there():
    from repdeg_fast.integrations.sentence_transformers import GlobalOrthogonalRegularizationLoss

    x = torch.randn(1, 8, requires_grad=True)
    terms, (gradient,) = terms_and_gradients(GlobalOrthogonalRegularizationLoss(torch.nn.Identity()), [x])
    assert [term.item() for term in terms.values()] == [0, 0]
    assert gradient.norm() <= 1e-6


def test_another_similarity_is_theirs(monkeypatch):
    from sentence_transformers.util import dot_score

    from repdeg_fast.integrations.sentence_transformers import GlobalOrthogonalRegularizationLoss

    x = embeddings(7, 3)
    ours, other = (
        one(torch.nn.Identity(), similarity_fct=dot_score) for one in (GlobalOrthogonalRegularizationLoss, theirs())
    )
    assert ours.compute_gor(x) == other.compute_gor(x)
    assert ours.get_config_dict() == other.get_config_dict()
    monkeypatch.setenv("REPDEG_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="the regularization is not fused"):
        ours.compute_gor(x)


@pytest.mark.parametrize("shape", [(12, 12, 5), (9, 21, 30), (21, 9, 4)], ids=str)
def test_two_sets_against_the_paper(place, shape):
    """Pairs of descriptors that do not match."""
    n, m, d = shape
    dtype = torch.float32
    x, y = (torch.randn(size, d).add(0.5).to(place.device, dtype).requires_grad_() for size in (n, m))
    value = global_orthogonal_regularization(x, y, mean_weight=0.7, second_moment_weight=2.0)
    a, b = x.detach().cpu().double().requires_grad_(), y.detach().cpu().double().requires_grad_()
    cosines = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T)[~torch.eye(n, m, dtype=torch.bool)]
    expected = 0.7 * cosines.mean() ** 2 + 2 * (cosines.square().mean() - 1 / d).relu()
    assert relative_error(value, expected) <= 1e-5
    for one, other in zip(torch.autograd.grad(value, [x, y]), torch.autograd.grad(expected, [a, b]), strict=True):
        assert relative_error(one, other) <= 1e-5


def test_terms_add_up(place):
    x = torch.randn(30, 6, device=place.device) + 0.5
    terms = global_orthogonal_regularization(x, mean_weight=0.3, reduction="none")
    assert terms.shape == (2,)
    assert relative_error(global_orthogonal_regularization(x, mean_weight=0.3), terms.sum()) <= 1e-6
    assert global_orthogonal_regularization(x, mean_weight=0, reduction="none")[0] == 0


@pytest.mark.parametrize("measure", ["gor", "logmeanexp", "square"])
def test_benchmark_compares_equals(measure):
    suite = suites()["pairwise"]
    case = suite.case_of_weights("small", torch.randn(40, 8) + 0.3)
    inputs = suite.make_inputs(case, torch.device("cpu"))
    inputs["measure"] = torch.tensor(("gor", "logmeanexp", "square").index(measure))
    expected = suite.exact(inputs)
    for provider in suite.providers:
        if provider.name != "compile" and provider.unavailable(inputs) is None:
            assert relative_error(provider.prepare(inputs)(), expected) <= 1e-5
