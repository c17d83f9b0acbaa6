"""Looking at models: what was measured in their weights and hidden states, saved and drawn."""

from repdeg_fast.analysis.admin import plot_table, save_table
from repdeg_fast.analysis.cca import CanonicalCorrelations, cca, pwcca, svcca
from repdeg_fast.analysis.cka import linear_cka
from repdeg_fast.analysis.covariances import Covariances
from repdeg_fast.analysis.procrustes import procrustes

__all__ = [
    "CanonicalCorrelations",
    "Covariances",
    "cca",
    "linear_cka",
    "plot_table",
    "procrustes",
    "pwcca",
    "save_table",
    "svcca",
]
