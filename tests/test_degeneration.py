"""Measures of degeneration and of neighbours, against plain calculations on all pairs."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from repdeg_fast import analysis
from repdeg_fast.analysis import neighbours, tiles
from repdeg_fast.analysis.cosines import uniformity_of_even
from repdeg_fast.backends import use_backend
from repdeg_fast.native import build


def cone(n=300, d=12):
    """Rows that share a direction, as those of a degenerate embedding, with a zero row."""
    points = torch.randn(n, d) + 1.5 * torch.randn(d)
    points[5] = 0
    return points


def cosines(points):
    unit = normalize(points.double())
    return unit @ unit.T


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small data has many tiles, in both directions, and some are narrower."""
    monkeypatch.setattr(tiles, "SIDE", {"cpu": 70})


def test_average_cosine_against_all_pairs():
    points = cone()
    nonzero = torch.cat([points[:5], points[6:]])
    expected = float((cosines(nonzero).sum() - 299) / (299 * 298))
    assert analysis.average_cosine(points) == pytest.approx(expected, rel=1e-10)
    assert analysis.average_cosine(torch.ones(10, 3)) == pytest.approx(1)
    assert abs(analysis.average_cosine(torch.randn(5000, 64))) < 1e-3
    assert math.isnan(analysis.average_cosine(torch.eye(3)[:1]))


def test_cosine_histogram_against_numpy():
    points = cone(5000, 4)[6:]  # three blocks a side
    counts, edges = analysis.cosine_histogram(points, bins=20)
    upper = cosines(points)[torch.ones(4994, 4994, dtype=torch.bool).triu(1)]
    expected, numpy_edges = np.histogram(upper.numpy().clip(-1, 1), 20, (-1, 1))
    np.testing.assert_allclose(edges, numpy_edges, atol=1e-15)
    assert int(counts.sum()) == 4994 * 4993 // 2
    assert np.abs(counts.numpy() - expected).sum() <= 20  # cosines at an edge, in float32
    fewer, _ = analysis.cosine_histogram(points, sample=100)
    assert int(fewer.sum()) == 100 * 99 // 2


def test_uniformity_against_pairwise_distances():
    points = cone(4500, 5)[6:]
    expected = torch.pdist(normalize(points.double())).square().mul(-2).exp().mean().log()
    assert analysis.uniformity(points) == pytest.approx(float(expected), rel=1e-5)
    assert analysis.uniformity(points.double()) == pytest.approx(float(expected), rel=1e-10)
    assert analysis.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    d = 400
    assert analysis.uniformity(torch.randn(1000, d)) == pytest.approx(-4 + 8 / d, abs=5e-3)  # E exp(4c) ≈ exp(8/d)


def test_uniformity_of_evenly_spread_directions():
    assert uniformity_of_even(3) == pytest.approx(math.log(math.sinh(4) / 4) - 4, rel=1e-12)  # c is uniform in 3-D
    assert uniformity_of_even(400) == pytest.approx(-4 + 8 / 400, abs=1e-4)
    for d in (1, 5):
        found = analysis.uniformity(torch.randn(3000, d).double(), t=1.5)
        assert uniformity_of_even(d, t=1.5) == pytest.approx(found, abs=0.02)


def test_alignment_against_the_definition():
    x, y = torch.randn(50, 6), torch.randn(50, 6)
    expected = (normalize(x.double()) - normalize(y.double())).norm(dim=1)
    assert analysis.alignment(x, y) == pytest.approx(float(expected.square().mean()), rel=1e-10)
    assert analysis.alignment(x, y, alpha=1) == pytest.approx(float(expected.mean()), rel=1e-10)
    assert analysis.alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert analysis.alignment(x, -x) == pytest.approx(4)
    with pytest.raises(ValueError, match=r"y: expected the shape of x and rows, got \(50, 6\) and \(49, 6\)"):
        analysis.alignment(x, y[1:])


@pytest.mark.parametrize("points", [cone(), cone(8, 12)], ids=["tall", "fewer points than dimensions"])
def test_spectra_against_svd(points):
    double = points.double()
    for centred, matrix in ((False, double), (True, double - double.mean(0))):
        values = torch.linalg.svdvals(matrix)
        found = analysis.singular_values(points, centred=centred)
        torch.testing.assert_close(found[: len(values)], values, rtol=1e-9, atol=1e-6)
        assert found[len(values) :].abs().sum() < 1e-5
        share = values[values > 1e-9] / values.sum()
        expected = float((-share * share.log()).sum().exp())
        assert analysis.effective_rank(points, centred=centred) == pytest.approx(expected, rel=1e-4)
        expected = float(values.square().sum() ** 2 / values.pow(4).sum())
        assert analysis.participation_ratio(points, centred=centred) == pytest.approx(expected, rel=1e-9)


def test_spectral_measures_of_covariances_are_those_of_the_points():
    points = cone()
    covariances = analysis.Covariances().update(points[:100]).update(points[100:])
    for measure in (analysis.effective_rank, analysis.participation_ratio, analysis.isoscore):
        assert measure(covariances) == pytest.approx(measure(points), rel=1e-9)


def test_known_spectra():
    even, single = torch.ones(8).double(), torch.tensor([3.0, 0, 0, 0]).double()
    assert [analysis.effective_rank(even), analysis.participation_ratio(even)] == pytest.approx([8, 8])
    assert analysis.directions_for(even, 0.9) == 8
    assert [analysis.effective_rank(single), analysis.participation_ratio(single)] == pytest.approx([1, 1])
    assert analysis.directions_for(single, 0.9) == 1


def test_isoscore():
    """Against the package in its limits and steps: the formula written out, and 1 and 0 for known variances."""
    points = cone()
    d = 12
    variances = np.linalg.eigvalsh(np.cov(points.double().numpy().T))
    normalized = np.sqrt(d) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalized - 1) / np.sqrt(2 * (d - np.sqrt(d)))
    fraction = (d - defect**2 * (d - np.sqrt(d))) ** 2 / d**2
    assert analysis.isoscore(points) == pytest.approx((d * fraction - 1) / (d - 1), rel=1e-9)
    even = torch.cat([torch.eye(6), -torch.eye(6)])
    assert analysis.isoscore(even) == pytest.approx(1)
    assert analysis.isoscore(torch.outer(torch.randn(50), torch.randn(6)).double()) == pytest.approx(0, abs=1e-9)
    assert math.isnan(analysis.isoscore(torch.ones(5, 3)))
    with pytest.raises(ValueError, match="points: expected some, got none"):
        analysis.isoscore(torch.ones(0, 3))


def test_isoscore_of_its_package():
    package = pytest.importorskip("IsoScore.IsoScore")
    points = torch.randn(400, 10).double() * torch.linspace(0.1, 1, 10) + 3
    with pytest.warns(UserWarning, match="clone"):
        assert analysis.isoscore(points) == pytest.approx(float(package.IsoScore(points)), rel=1e-6)


def test_isotropy_takes_both_signs():
    points = cone(50, 4)
    directions = torch.linalg.svd(points.double()).Vh
    partition = (points.double() @ torch.cat([directions, -directions]).T).exp().sum(0)
    assert analysis.isotropy(points) == pytest.approx(float(partition.min() / partition.max()), rel=1e-9)
    assert analysis.isotropy(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(1)
    assert analysis.isotropy(-points) == pytest.approx(analysis.isotropy(points), rel=1e-9)
    assert analysis.isotropy(1000 * points) == 0  # exp(1000) is no double


def test_cone_projection():
    points = cone()
    coordinates, plane = analysis.cone_projection(points)
    _, values, directions = torch.linalg.svd(points.double(), full_matrices=False)
    torch.testing.assert_close(coordinates.norm(dim=0), values[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close((plane.T @ directions[:2].T).abs(), torch.eye(2).double(), rtol=0, atol=1e-9)
    assert (coordinates.mean(0) >= 0).all()
    assert analysis.cone_projection(torch.randn(5, 1))[0][:, 1].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(300, 3), (300, 50), (1500, 2), (140, 139), (2, 1)])
def test_nearest_against_a_sorted_matrix(n, k, dtype, backend, small_tiles):
    points = cone(max(n, 6))[:n].to(dtype)
    expected = cosines(points).fill_diagonal_(-2)
    with use_backend(backend):
        values, indices = neighbours.nearest(points, k)
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), expected.topk(k).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(expected.gather(1, indices), values.double(), rtol=0, atol=1e-6)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_of_equal_cosines_the_lowest_indices_are_nearest(small_tiles):
    if reason := build.unavailable("cpu"):
        pytest.skip(reason)
    kinds = torch.arange(400) % 3
    values, indices = neighbours.nearest(torch.eye(3)[kinds], 150)  # 134 or 133 of each kind, then those of others
    for point in (0, 1, 70, 211, 399):
        others = torch.arange(400)[torch.arange(400) != point]
        equal, rest = others[kinds[others] == kinds[point]], others[kinds[others] != kinds[point]]
        assert indices[point].tolist() == torch.cat([equal, rest])[:150].tolist()
    assert set(values.unique().tolist()) == {0.0, 1.0}


@pytest.mark.cpp
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_tile_of_many_points(by_columns):
    """More than the strips of points whose thresholds are at hand; what they have differs from strip to strip."""
    if reason := build.unavailable("cpu"):
        pytest.skip(reason)
    build.load("cpu")
    before = torch.linspace(0.9, -0.9, 600)[:, None].repeat(1, 2)
    tile = torch.rand(600, 70) * 2 - 1
    values, indices = before.clone(), torch.tensor([[0, 1]]).repeat(600, 1)
    given = tile.t().contiguous().t() if by_columns else tile
    torch.ops.repdeg_fast_native.neighbours_look.default(values, indices, given, 2)
    expected = torch.cat([before, tile], dim=1).topk(2).values
    assert torch.equal(values.sort(descending=True).values, expected)
    assert torch.equal(torch.cat([before, tile], dim=1).gather(1, indices), values)


def test_nearest_do_not_depend_on_the_number_of_threads(threads):
    points, found = torch.randn(3000, 16), []
    for number in (1, 3):
        threads(number)
        found.append(neighbours.nearest(points, 20)[1])
    assert (found[0] == found[1]).float().mean() > 0.999  # but for cosines that rounding makes equal


def test_token_identity_against_all_pairs(small_tiles):
    tokens = torch.randint(6, (300,))
    points = cone() + 0.7 * torch.randn(6, 12)[tokens]
    order = cosines(points).fill_diagonal_(-2).topk(10).indices
    expected = float((tokens[order] == tokens[:, None]).double().mean())
    assert analysis.token_identity(points, tokens, k=10) == pytest.approx(expected, abs=1e-3)
    islands = torch.eye(6)[tokens] + 1e-3 * torch.rand(300, 6)
    assert analysis.token_identity(islands, tokens, k=10) == 1
    assert analysis.token_identity(torch.randn(300, 12), tokens, k=50) == pytest.approx(1 / 6, abs=0.03)
    with pytest.raises(ValueError, match="k: expected 1 ≤ k < 300, the number of points, got 300"):
        analysis.token_identity(points, tokens, k=300)
    with pytest.raises(ValueError, match="tokens: expected 300, one a point, got 299"):
        analysis.token_identity(points, tokens[1:])
    with pytest.raises(ValueError, match="tokens: expected a vector of integers"):
        analysis.token_identity(points, tokens.float())


def test_position_distance_against_all_pairs(small_tiles):
    positions, tokens, points = torch.randint(40, (300,)), torch.randint(4, (300,)), torch.randn(300, 12)
    order = cosines(points).fill_diagonal_(-2).topk(10).indices
    expected = float((positions[order] - positions[:, None]).abs().double().mean())
    assert analysis.position_distance(points, positions, k=10) == pytest.approx(expected, abs=1e-2)
    masked = cosines(points).fill_diagonal_(-2).masked_fill(tokens[:, None] != tokens, -2)
    expected = float((positions[masked.topk(10).indices] - positions[:, None]).abs().double().mean())
    assert analysis.position_distance(points, positions, tokens, k=10) == pytest.approx(expected, abs=1e-2)
    clock = torch.stack(
        [(positions / 20).sin(), (positions / 20).cos()], 1
    )  # says the position, so neighbours share it
    assert analysis.position_distance(clock, positions, k=3) < 1
    with pytest.raises(ValueError, match="expected some that occur twice"):
        analysis.position_distance(points, positions, torch.arange(300))


def test_position_distance_by_chance_is_what_random_vectors_have():
    positions, tokens = torch.randint(40, (2000,)), torch.randint(4, (2000,))
    for groups in (None, tokens):
        chance = analysis.position_distance_by_chance(positions, groups, k=20)
        found = analysis.position_distance(torch.randn(2000, 12), positions, groups, k=20)
        assert found == pytest.approx(chance, rel=0.03)
    pairs = (positions[:, None] - positions).abs().double()
    chance = analysis.position_distance_by_chance(positions)
    assert chance == pytest.approx(float(pairs.sum() / (2000 * 1999)), rel=1e-9)


def test_hubness():
    points = torch.randn(400, 20)
    order = cosines(points).fill_diagonal_(-2).topk(10).indices
    occurrences = order.flatten().bincount(minlength=400).double().numpy()
    found = analysis.hubness(points)
    assert found.skewness == pytest.approx(float(((occurrences - 10) ** 3).mean() / occurrences.std() ** 3), rel=0.02)
    assert abs(found.largest - occurrences.max()) <= 1
    assert found.orphans == pytest.approx((occurrences == 0).mean(), abs=0.01)
    circle = torch.arange(12) * math.pi / 6
    even = analysis.hubness(torch.stack([circle.sin(), circle.cos()], 1).double(), k=2)
    assert even.largest <= 3
    hub = torch.cat([torch.eye(20), torch.ones(1, 20)])  # everyone's nearest
    assert analysis.hubness(hub, k=1) == neighbours.Hubness(pytest.approx(4.2, abs=0.3), 20, pytest.approx(19 / 21))


def test_rare_against_frequent():
    points = torch.randn(1000, 8)
    points[:600] += 3  # the rare ones point one way
    counts = torch.arange(1000) - 100
    counts = counts.clamp_min(0)
    groups = {group.name: group for group in analysis.rare_against_frequent(points, counts, share=0.4)}
    assert {name: group.tokens for name, group in groups.items()} == {"never": 101, "rare": 539, "frequent": 360}
    assert groups["rare"].average_cosine == pytest.approx(analysis.average_cosine(points[101:640]), rel=1e-9)
    assert groups["frequent"].mean_norm == pytest.approx(float(points[640:].double().norm(dim=1).mean()), rel=1e-9)
    assert groups["rare"].average_cosine > 0.7 > 0.1 > groups["frequent"].average_cosine
    assert groups["frequent"].cosine_to_frequent == pytest.approx(1)
    with pytest.raises(ValueError, match=r"counts: expected a vector of 1000, one a token, got \(999,\)"):
        analysis.rare_against_frequent(points, counts[1:])
    with pytest.raises(ValueError, match="counts: expected none below 0 and some above"):
        analysis.rare_against_frequent(points, torch.zeros(1000))


def test_frequency_bins_hold_equally_many_occurrences():
    counts = (1000 / (1 + torch.arange(500))).long()  # Zipf's
    bins = analysis.frequency_bins(counts, 4)
    held = [int(counts[bins == i].sum()) for i in range(4)]
    assert max(held) < 1.7 * min(held)
    assert counts[bins == 0].max() <= counts[bins == 3].min()
    assert analysis.frequency_bins(torch.tensor([0, 3, 9]), 2)[0] == -1


def test_mutual_information_in_its_limits():
    pytest.importorskip("sklearn")
    tokens = torch.randint(30, (3000,))
    entropy = float(torch.distributions.Categorical(tokens.bincount().double()).entropy())
    islands = torch.randn(30, 16)[tokens] * 10 + 0.01 * torch.randn(3000, 16)
    found = analysis.mutual_information(islands, tokens, clusters=200)
    assert found.entropy == pytest.approx(entropy, rel=1e-9)
    assert found.corrected == pytest.approx(entropy, rel=0.01)
    shuffled = analysis.mutual_information(islands, tokens[torch.randperm(3000)], clusters=200)
    assert abs(shuffled.corrected) < 0.03
    same = analysis.mutual_information_of_labels(tokens, tokens)
    assert same.plug_in == pytest.approx(entropy, rel=1e-9)
    assert same.corrected == pytest.approx(entropy, rel=1e-9)
    assert analysis.mutual_information_of_labels(torch.arange(600), tokens[:600]).corrected == 0


def test_mutual_information_against_plain_counting():
    pytest.importorskip("sklearn")
    first, second = torch.randint(20, (500,)), torch.randint(12, (500,))
    second[first < 5] = 3
    joint = torch.zeros(20, 12).double().index_put_((first, second), torch.tensor(1.0).double(), accumulate=True) / 500
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    expected = float((joint * (joint / independent).log()).nan_to_num(0).sum())
    found = analysis.mutual_information_of_labels(first, second)
    assert found.plug_in == pytest.approx(expected, rel=1e-9)
    shuffled = [
        analysis.mutual_information_of_labels(first, second[torch.randperm(500)]).plug_in for _ in range(60)
    ]  # the mean of these is what by_chance is, exactly
    assert found.by_chance == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / 60**0.5)
    with pytest.raises(ValueError, match=r"labels: expected a vector of 500 integers .* got torch.int64 \(499,\)"):
        analysis.mutual_information(torch.randn(500, 3), second[1:])


@pytest.mark.parametrize(
    "measure",
    [
        analysis.average_cosine, analysis.cosine_histogram, analysis.uniformity, analysis.singular_values,
        analysis.effective_rank, analysis.isotropy, analysis.isoscore, analysis.hubness, analysis.cone_projection,
    ],
)  # fmt: skip
def test_points_that_are_no_finite_matrix_are_named(measure):
    points = torch.randn(30, 4)
    points[9, 2] = float("inf")
    with pytest.raises(ValueError, match="points: expected finite values, got NaN or Inf, first in point 9"):
        measure(points)
    with pytest.raises(ValueError, match="points: expected a floating matrix"):
        measure(torch.ones(3, 4, dtype=torch.long))
    measure(torch.randn(30, 4).bfloat16())


def test_tokens_that_never_occur_and_counts_that_are_none():
    assert analysis.frequency_bins(torch.tensor([0, 3, 0, 2]), 2).tolist() == [-1, 1, -1, 0]
    for counts in (torch.zeros(5), torch.tensor([1, -1]), torch.tensor([1, float("nan")])):
        with pytest.raises(ValueError, match="counts: expected none below 0 and some above"):
            analysis.frequency_bins(counts, 3)
    for counts in ([1, 2], torch.ones(2, 2), torch.ones(0)):
        with pytest.raises(ValueError, match=r"counts: expected a vector \(V,\), how often each token occurs, got"):
            analysis.frequency_bins(counts, 3)
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        analysis.frequency_bins(torch.ones(3), 0)


def test_constant_and_duplicate_features_and_few_points_have_a_rank():
    points = torch.randn(60, 5)
    odd = torch.cat([points, torch.full((60, 2), 7.0), points[:, :1]], 1)
    assert (analysis.singular_values(odd, centred=True) > 1e-5).sum() == 5
    assert 0 < analysis.isoscore(odd) < analysis.isoscore(points)
    few = torch.randn(6, 20)
    assert analysis.effective_rank(few, centred=True) <= 5 + 1e-4
    assert analysis.directions_for(few, 1 - 1e-9, centred=True) == 5
    assert 0 < analysis.isotropy(few) <= 1
    same = analysis.representation_metrics(torch.ones(9, 4))
    assert same["average_cosine"] == pytest.approx(1)
    assert same["effective_rank"] == 0
    assert math.isnan(same["isoscore"])


def test_numbers_that_make_no_sense_are_named():
    points, places = torch.randn(30, 4), torch.arange(30)
    for run, message in (
        (lambda: analysis.cosine_histogram(points, bins=0), "bins: expected at least 1, got 0"),
        (lambda: analysis.cosine_histogram(points, sample=1), "sample: expected at least 2 points, got 1"),
        (lambda: analysis.uniformity(points, t=0), "t: expected a number above 0, got 0"),
        (lambda: analysis.directions_for(points, 2.0), r"share: expected a number in \(0, 1\], got 2.0"),
        (lambda: analysis.nearest(points, 2.5), "k: expected 1 ≤ k < 30, the number of points, got 2.5"),
        (lambda: analysis.position_distance(points[:1], places[:1]), "points: expected at least 2, got 1"),
        (lambda: analysis.Covariances().mean(), "covariances: expected points, got none; call update first"),
        (lambda: analysis.Covariances().update(points).mean(2), "sides: got 2; there are 0 … 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert math.isnan(analysis.position_distance_by_chance(places[:1]))
    with pytest.raises(TypeError, match="points: expected a tensor, got NoneType"):
        analysis.representation_metrics(None)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_norms_that_fp32_cannot_square(scale):
    points = torch.randn(40, 8)
    assert analysis.uniformity(points * scale) == pytest.approx(analysis.uniformity(points), rel=1e-4)


def test_nothing_uses_no_direction():
    zeros = torch.zeros(5, 3)
    assert (analysis.effective_rank(zeros), analysis.directions_for(zeros, 0.9)) == (0, 0)
