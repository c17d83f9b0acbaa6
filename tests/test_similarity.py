"""CCA, SVCCA, PWCCA, CKA and Procrustes from streamed covariances, against the points themselves in NumPy."""

import copy
import pickle

import numpy as np
import pytest
import torch

from repdeg_fast.analysis import Covariances, cca, cka_matrix, linear_cka, procrustes, pwcca, svcca

MEASURES = [cca, svcca, pwcca, linear_cka, procrustes]


def points(n=400, d=9, e=13, shift=3.0):
    """Two views of common causes, in float32, with means that are not zero."""
    causes = torch.randn(n, 7)
    x = causes @ torch.randn(7, d) + 0.5 * torch.randn(n, d) + shift
    y = causes @ torch.randn(7, e) + 0.5 * torch.randn(n, e) - shift
    return x, y


def centred(x):
    x = x.double().numpy()
    return x - x.mean(0)


def by_qr(x, y):
    """Canonical correlations and variates as the cosines between two subspaces of R^n (Björck and Golub)."""
    (qx, _), (qy, _) = np.linalg.qr(centred(x)), np.linalg.qr(centred(y))
    u, correlations, v = np.linalg.svd(qx.T @ qy, full_matrices=False)
    return correlations, qx @ u, qy @ v.T


@pytest.mark.parametrize("narrower", ["x", "y"])
def test_pwcca_and_cca_against_the_variates_themselves(narrower):
    x, y = points() if narrower == "x" else points(d=13, e=9)
    correlations, of_x, of_y = by_qr(x, y)
    variates, features = (of_x, centred(x)) if narrower == "x" else (of_y, centred(y))
    weights = np.abs(variates.T @ features).sum(1)
    weights /= weights.sum()
    found = pwcca(x, y)
    np.testing.assert_allclose(found.correlations, correlations, rtol=1e-9)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-7)
    assert found.similarity == pytest.approx(float(weights @ correlations), rel=1e-9)
    assert found.distance == 1 - found.similarity
    assert cca(x, y).similarity == pytest.approx(correlations.mean(), rel=1e-9)
    assert (found.rank_x, found.rank_y, found.points) == (x.shape[1], y.shape[1], 400)


@pytest.mark.parametrize("smallest", [1e-3, 1e-5])  # the latter's variances are near the threshold: by eigenvectors
def test_features_of_very_different_scales(smallest):
    x, y = points()
    scaled = x.double() * torch.logspace(0, np.log10(smallest), 9, dtype=torch.float64)
    found = pwcca(scaled, y, threshold=1e-12)
    correlations, of_x, _ = by_qr(scaled, y)
    weights = np.abs(of_x.T @ centred(scaled)).sum(1)
    assert (found.rank_x, found.rank_y) == (9, 13)
    np.testing.assert_allclose(found.correlations, correlations, rtol=1e-7)
    np.testing.assert_allclose(found.weights, weights / weights.sum(), rtol=1e-6)
    assert pwcca(scaled, y, threshold=0.01).rank_x < 9


def test_small_correlations_keep_their_digits():
    directions = np.linalg.qr(centred(torch.randn(500, 8)))[0] * 500**0.5
    share = np.array([1.0, 1e-3, 1e-6, 0.0])
    x, noise = torch.from_numpy(directions[:, :4]), torch.from_numpy(directions[:, 4:])
    y = x * torch.from_numpy(share) + noise * torch.from_numpy(np.sqrt(1 - share**2))
    np.testing.assert_allclose(cca(x, y).correlations, share, rtol=1e-9, atol=1e-14)


def test_svcca_keeps_the_leading_components():
    x, y = points()

    def leading(z, share):
        u, s, _ = np.linalg.svd(centred(z), full_matrices=False)
        energy = np.cumsum(s**2) / np.sum(s**2)
        return torch.from_numpy(u * s)[:, : int(np.sum(energy < share)) + 1]

    for share in (0.6, 0.99):
        cut = [leading(z, share) for z in (x, y)]
        found = svcca(x, y, share=share)
        assert (found.rank_x, found.rank_y) == (cut[0].shape[1], cut[1].shape[1])
        assert found.similarity == pytest.approx(by_qr(*cut)[0].mean(), rel=1e-9)


def published_pwcca(x, y, epsilon):
    """The arithmetic of google/svcca for x not wider than y, written out over the points."""
    x, y = x.double().numpy().T, y.double().numpy().T
    covariance = np.cov(x, y)
    d = len(x)
    xx, xy, yy = covariance[:d, :d], covariance[:d, d:], covariance[d:, d:]
    xy = xy / np.sqrt(np.abs(xx).max() * np.abs(yy).max())

    def whitener(sigma):
        values, vectors = np.linalg.eigh(np.linalg.pinv(sigma / np.abs(sigma).max() + epsilon * np.eye(len(sigma))))
        return vectors @ np.diag(np.sqrt(values)) @ vectors.T

    u, correlations, _ = np.linalg.svd(whitener(xx) @ xy @ whitener(yy))
    means = x.mean(1, keepdims=True)
    directions = u.T @ (x - means) + means
    basis, _ = np.linalg.qr(directions.T)
    weights = np.abs(basis.T @ x.T).sum(1)
    weights /= weights.sum()
    return float(weights @ correlations), weights


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_old_numbers_of_google_svcca_can_be_checked(shift):
    x, y = points(shift=shift)
    similarity, weights = published_pwcca(x, y, 1e-6)
    found = pwcca(x, y, convention="svcca", threshold=1e-6)
    assert found.similarity == pytest.approx(similarity, rel=1e-9)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-6)
    assert abs(found.similarity - pwcca(x, y).similarity) > 1e-3  # the paper's definition is another one


def test_google_svcca_has_no_answer_for_a_narrower_y_or_a_dead_feature():
    x, y = points()
    dead = x.clone()
    dead[:, 2] = 1
    for arguments in ((y, x), (dead, y)):
        with pytest.raises(ValueError, match="convention: 'svcca' is not defined where"):
            pwcca(*arguments, convention="svcca", threshold=1e-6)
    with pytest.raises(ValueError, match="convention: 'svcca' is not defined for the dependent features of these 6"):
        pwcca(torch.randn(6, 20), torch.randn(6, 30), convention="svcca")
    with pytest.raises(ValueError, match="expected 'paper' or 'svcca', got 'google'"):
        pwcca(x, y, convention="google")


def centring(n):
    return np.eye(n) - 1 / n


def gram_cka(x, y):
    h = centring(len(x))
    k, m = (h @ z @ z.T @ h for z in (x.double().numpy(), y.double().numpy()))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def gram_unbiased_cka(x, y):
    """Song et al.'s estimator on the n×n Gram matrices."""
    n = len(x)

    def hsic(k, m):
        one = np.ones(n)
        total = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ m) + total - 2 / (n - 2) * (one @ k @ m @ one)

    k, m = (z.double().numpy() @ z.double().numpy().T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("n", [4, 30, 400])
def test_linear_cka_against_gram_matrices(n):
    x, y = points(n)
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y), rel=1e-10)
    assert linear_cka(x, y, unbiased=True) == pytest.approx(gram_unbiased_cka(x, y), rel=1e-8)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_of_all_pairs_is_that_of_each(unbiased):
    sides = [*points(), torch.randn(400, 5)]
    found = cka_matrix(Covariances().update(*sides), unbiased=unbiased)
    expected = [[linear_cka(a, b, unbiased=unbiased) for a in sides] for b in sides]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="side 2: all its 400 points are the same"):
        cka_matrix(Covariances().update(*sides[:2], torch.ones(400, 3)))
    with pytest.raises(ValueError, match="side 0 and side 2 are further apart"):
        cka_matrix(Covariances(band=1).update(*sides))


def test_procrustes_against_the_best_rotation():
    x, y = points(d=6, e=6)
    a, b = (centred(z) / np.linalg.norm(centred(z)) for z in (x, y))
    u, _, v = np.linalg.svd(b.T @ a)
    assert procrustes(x, y) == pytest.approx(np.linalg.norm(a - b @ (u @ v)) ** 2, rel=1e-9)


def test_equal_representations_are_at_distance_zero():
    x, _ = points(d=6)
    turned = 3 * x.double() @ torch.linalg.qr(torch.randn(6, 6).double())[0] + 1
    for y in (x, turned):
        assert [f(x, y).distance for f in (cca, svcca, pwcca)] == pytest.approx([0, 0, 0], abs=1e-9)
        assert linear_cka(x, y) == pytest.approx(1, abs=1e-9)
        assert linear_cka(x, y, unbiased=True) == pytest.approx(1, abs=1e-9)
        assert procrustes(x, y) == pytest.approx(0, abs=1e-9)
    assert pwcca(x, x @ torch.randn(6, 6)).distance == pytest.approx(0, abs=1e-5)  # any invertible map


def test_independent_representations_give_the_random_baseline():
    """For independent Gaussians the mean squared correlation is the wider side's width over n − 1, biased CKA is near
    √(de)/n, and its unbiased form is 0 but for noise."""
    x, y = torch.randn(2000, 20), torch.randn(2000, 60)
    assert float(cca(x, y).correlations.square().mean()) == pytest.approx(60 / 1999, rel=0.1)
    for measure in (svcca, pwcca):  # nothing leads: their weights are about even
        assert measure(x, y).similarity == pytest.approx(cca(x, y).similarity, rel=0.05)
    assert linear_cka(x, y) == pytest.approx((20 * 60) ** 0.5 / 2000, rel=0.15)
    assert abs(linear_cka(x, y, unbiased=True)) < 4e-3
    assert procrustes(x, y) > 1.5


def test_streams_and_merges_give_what_all_points_at_once_give():
    x, y = points(5000, shift=1000.0)  # more than a chunk; a mean that is large beside the spread
    whole = Covariances().update(x, y)
    parts = [Covariances() for _ in range(3)]
    for i, (a, b) in enumerate(zip(x.split(700), y.split(700), strict=True)):
        parts[i % 3].update(a, b)
    merged = Covariances()
    for part in parts:
        before = copy.deepcopy(part)
        merged.merge(pickle.loads(pickle.dumps(part)))  # as another process sends it
        assert torch.equal(part.scatter(0, 1), before.scatter(0, 1))
    assert merged.points == 5000
    torch.testing.assert_close(merged.mean(), x.double().mean(0), rtol=1e-12, atol=0)
    for sides in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = torch.from_numpy(centred((x, y)[sides[0]]).T @ centred((x, y)[sides[1]]))
        for found in (whole, merged):
            torch.testing.assert_close(found.scatter(*sides), expected, rtol=1e-9, atol=1e-6)
    double = x.double()
    torch.testing.assert_close(merged.second_moment(), double.T @ double, rtol=1e-12, atol=0)
    for found in (whole, merged):
        assert pwcca(found).similarity == pytest.approx(pwcca(x - 1000, y + 1000).similarity, rel=1e-6)
        assert linear_cka(found, unbiased=True) == pytest.approx(
            linear_cka(x - 1000, y + 1000, unbiased=True), rel=1e-6
        )


def test_two_of_several_sides():
    x, y = points()
    z = torch.randn(400, 5)
    several = Covariances(["embeddings", "layer 1", "layer 2"]).update(x, y, z)
    for sides, pair in (((0, 1), (x, y)), ((2, 0), (z, x)), ((1, 1), (y, y))):
        for measure in MEASURES:
            expected, found = measure(*pair), measure(several.of(*sides))
            assert getattr(found, "distance", found) == pytest.approx(getattr(expected, "distance", expected), abs=1e-9)
    with pytest.raises(ValueError, match=r"expected two sides, got 3; covariances\.of"):
        pwcca(several)
    with pytest.raises(ValueError, match=r"sides: got 3; there are 0 … 2"):
        several.of(0, 3)


def test_dependent_features_and_few_points_give_the_rank():
    x, y = points()
    odd = torch.cat([x, x[:, :2], torch.ones(400, 1), x @ torch.randn(9, 3)], 1)
    found, expected = pwcca(odd, y), pwcca(x, y)
    assert found.rank_x == 9
    torch.testing.assert_close(found.correlations, expected.correlations, rtol=1e-4, atol=0)
    assert found.forced == 0
    few = pwcca(torch.randn(10, 20), torch.randn(10, 30))
    assert (few.rank_x, few.rank_y, few.forced) == (9, 9, 9)
    assert few.distance == pytest.approx(0, abs=1e-9)
    assert cca(torch.randn(10, 6), torch.randn(10, 5)).forced == 2


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_points_are_named(measure):
    x, y = points(50)
    with pytest.raises(ValueError, match="y: expected 50 points as in x, got 49"):
        measure(x, y[1:])
    with pytest.raises(ValueError, match="y: all its 50 points are the same"):
        measure(x, torch.full_like(y, 1000.1))
    with pytest.raises(ValueError, match="points: expected at least 2, got 1"):
        measure(x[:1], y[:1])
    with pytest.raises(ValueError, match="points: expected at least 2, got 0"):
        measure(x[:0], y[:0])
    bad = y.clone()
    bad[7, 3] = float("nan")
    with pytest.raises(ValueError, match="y: expected finite values, got NaN or Inf, first in point 7"):
        measure(x, bad)
    with pytest.raises(ValueError, match="layer 2: expected finite values"):
        Covariances(["layer 1", "layer 2"]).update(x, bad)
    with pytest.raises(ValueError, match=r"y: expected a floating matrix .* got torch.float32 \(50,\)"):
        measure(x, y[:, 0])
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        measure(x.tolist(), y)
    with pytest.raises(ValueError, match="y: expected a second matrix"):
        measure(x)


def test_sides_that_do_not_fit_are_named():
    x, y = points(50)
    covariances = Covariances().update(x, y)
    with pytest.raises(ValueError, match=r"expected matrices of \[9, 13\] columns as before, got \[13, 9\]"):
        covariances.update(y, x)
    with pytest.raises(ValueError, match=r"other: expected sides of \[9, 13\] columns as here, got \[13, 9\]"):
        covariances.merge(Covariances().update(y, x))
    with pytest.raises(ValueError, match=r"sides: expected 2 \(a, b\), got 1"):
        Covariances(["a", "b"]).update(x)
    with pytest.raises(ValueError, match="points: expected at least 4, got 3"):
        linear_cka(x[:3], y[:3], unbiased=True)
    with pytest.raises(ValueError, match=r"threshold: expected a number in \(0, 1\), got 0"):
        cca(x, y, threshold=0)
