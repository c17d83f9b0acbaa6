"""A few numbers that say during training whether representations degenerate: cheap, on the device where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast.analysis.cosines import direction_sum, mean_cosine, uniformity
from repdeg_fast.analysis.covariances import Covariances, check_points
from repdeg_fast.analysis.frequency import rare_against_frequent
from repdeg_fast.analysis.spectrum import effective_rank, isoscore
from repdeg_fast.analysis.tiles import sampled

_SAMPLE = 4096  # points for what costs more than one look at each


@torch.no_grad()
def representation_metrics(points: Tensor, counts: Tensor | None = None, *, sample: int = _SAMPLE) -> dict[str, float]:
    """Average cosine and mean norm over all points; effective rank, IsoScore and uniformity of a sample of them.

    Args:
        points: (N, d), an embedding or sentence vectors.
        counts: (N,), how often each token occurs, adds ``average_cosine_rare``, ``…_frequent`` and ``…_never``.
        sample: Points for spectra and pairs, always the same ones.

    Raises:
        TypeError: no tensor.
        ValueError: no finite matrix, or fewer than two points.
    """
    check_points("points", points)
    if len(points) < 2:
        raise ValueError(f"points: expected at least 2, got {len(points)}")
    some = sampled(points, sample)
    covariances = Covariances(["points"]).update(some)
    total, nonzero = direction_sum(points)
    metrics = {
        "average_cosine": mean_cosine(total, nonzero),
        "mean_norm": float(torch.linalg.vector_norm(points.detach(), dim=1, dtype=torch.float32).double().mean()),
        "effective_rank": effective_rank(covariances, centred=True),
        "isoscore": isoscore(covariances),
        "uniformity": uniformity(some),
    }
    if counts is not None:
        for group in rare_against_frequent(points.detach(), counts.to(points.device)):
            metrics[f"average_cosine_{group.name}"] = group.average_cosine
    return metrics
