"""Mutual information of representations and labels, the input token, say (1909.01380)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import check_points


@dataclass(frozen=True)
class MutualInformation:
    """In nats, between clusters of representations and labels."""

    corrected: float  # 0 by chance, the entropy where clusters name the label
    plug_in: float  # of the counted frequencies: too large where points are few
    by_chance: float  # the plug-in's expectation were the labels shuffled, exactly
    entropy: float  # of the labels, of their counted frequencies
    clusters: int  # that have points


def mutual_information(
    representations: Tensor, labels: Tensor, clusters: int = 1000, *, seed: int = 0
) -> MutualInformation:
    """I(cluster; label), representations discretized by mini-batch k-means of scikit-learn.

    The plug-in estimate I is too large by an amount that grows with the number of cells that points must fill.
    Corrected for chance as Vinh et al. (2010) do: H·(I − E)/(H − E), with E the exact expectation of I under
    shuffled labels and H their entropy; 0 for labels that have nothing to do with the points, H for clusters that
    name the label. Where every point has a cluster of its own there is nothing to learn from, and it is 0. Estimates
    with unequal ``clusters`` do not compare.

    Args:
        representations: (N, d).
        labels: (N,) integers.
        clusters: At most N are made.

    Raises:
        ValueError: unequal lengths, no points, NaN, labels that are no integers.
        ImportError: scikit-learn is missing.
    """
    check_points("representations", representations)
    _check_labels(labels, len(representations))
    if clusters < 1:
        raise ValueError(f"clusters: expected at least 1, got {clusters}")
    cluster = _scikit_learn("cluster")
    clusters = min(clusters, len(representations))
    means = cluster.MiniBatchKMeans(
        clusters, random_state=seed, batch_size=max(1024, 3 * clusters), n_init=1, max_iter=10, init="random"
    )
    assigned = means.fit_predict(representations.detach().float().cpu().numpy())
    return mutual_information_of_labels(torch.from_numpy(assigned), labels)


def mutual_information_of_labels(first: Tensor, second: Tensor) -> MutualInformation:
    """The same of two labellings (N,) of the same points, the first in place of clusters."""
    metrics = _scikit_learn("metrics.cluster")
    from scipy.sparse import coo_matrix  # which it needs

    _check_labels(first, len(first))
    _check_labels(second, len(first))
    n = len(first)
    rows, columns = (labels.cpu().unique(return_inverse=True)[1] for labels in (first, second))
    table = coo_matrix((torch.ones(n, dtype=torch.int64).numpy(), (rows.numpy(), columns.numpy()))).tocsr()
    entropies = [_entropy(labels.bincount()) for labels in (rows, columns)]
    plug_in = sum(entropies) - _entropy(torch.from_numpy(table.data))
    by_chance = float(metrics.expected_mutual_information(table, n))
    room = entropies[1] - by_chance
    corrected = entropies[1] * (plug_in - by_chance) / room if room > 1e-6 * entropies[1] else 0.0
    return MutualInformation(corrected, plug_in, by_chance, entropies[1], table.shape[0])


def _entropy(counts: Tensor) -> float:
    return float(torch.special.entr(counts.double() / counts.sum()).sum())


def _scikit_learn(part: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as missing:
        raise ImportError("mutual_information needs scikit-learn: pip install 'repdeg-fast[analysis]'") from missing


def _check_labels(labels: Tensor, expected: int) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (expected,) or expected == 0:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected a vector of {expected} integers (at least one), one a point, got {got}")
