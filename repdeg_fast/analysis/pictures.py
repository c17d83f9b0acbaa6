"""Pictures of what was found in weights. matplotlib comes with the extra ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeg_fast._checks import InputError
from repdeg_fast.analysis.inspection import Inspection
from repdeg_fast.analysis.spectrum import effective_rank

_POINTS = 20_000  # rows in the picture


def pyplot() -> Any:
    """matplotlib without a display; a clear error where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib, which is missing: pip install 'repdeg-fast[cli]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def plain(text: str) -> str:
    """A tensor's name is no formula: matplotlib would read what is between two "$" as one."""
    return text.replace("$", r"\$")


def dot_size(points: int) -> float:
    """Of a dot, in square points: seen where there are few, and apart where there are many."""
    return min(40.0, max(3.0, 6000 / points))


def plot_cone(name: str, weight: Tensor, found: Inspection, path: Path) -> Path:
    """Left: the rows in the plane of the two leading singular vectors, seen from the origin. Right: the spectrum."""
    plt = pyplot()
    figure, (cone, spectrum) = plt.subplots(1, 2, figsize=(14, 6.2), layout="constrained")
    chosen = torch.randperm(found.rows, generator=torch.Generator().manual_seed(0))[:_POINTS].sort().values
    points = weight[chosen].double() @ found.plane
    dots = cone.scatter(
        *points.T.numpy(), c=found.norms[chosen].numpy(), s=dot_size(len(chosen)),
        alpha=0.5 if len(chosen) > 2000 else 0.9, cmap="viridis", linewidths=0,
    )  # fmt: skip
    cone.plot(0, 0, "+", color="red", markersize=16, markeredgewidth=2, label="origin")
    centre = points.mean(0).tolist()
    cone.annotate("", centre, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "red", "linewidth": 1.6})
    cone.plot([], [], color="red", label="mean row")
    figure.colorbar(dots, ax=cone, label="norm of the row").solids.set_alpha(1)
    energy = found.singular_values.square()
    energy = energy / energy.sum().clamp_min(1e-300)
    cone.set_xlabel(f"1st singular direction ({100 * float(energy[0]):.1f} % of the energy)")
    if len(energy) > 1:
        cone.set_ylabel(f"2nd singular direction ({100 * float(energy[1]):.1f} %)")
    shown = "all" if len(chosen) == found.rows else f"{len(chosen):,} of {found.rows:,}"
    cone.set_title(f"The cone: {shown} rows in the plane of the 2-D SVD\nR = {found.cosreg:.6f}")
    cone.set_aspect("equal", adjustable="datalim")
    cone.legend(loc="best", frameon=True)

    order = range(1, found.columns + 1)
    spectrum.plot(order, found.singular_values.numpy(), label="as it is", color="#b9b9b9", linewidth=2.5)
    spectrum.plot(order, found.centred_singular_values.numpy(), label="mean row taken off", color="#1f6fb4")
    scale = "log" if found.singular_values.any() else "linear"
    spectrum.set(xscale="log", yscale=scale, xlabel="rank", ylabel="singular value")
    spectrum.set_title(
        f"Spectrum: effective rank {effective_rank(found.centred_singular_values):.0f} of {found.columns}"
    )
    spectrum.grid(alpha=0.25, which="both")
    spectrum.legend(frameon=False)
    figure.suptitle(f"{plain(name)}, {found.rows:,} × {found.columns:,}", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
    return path
