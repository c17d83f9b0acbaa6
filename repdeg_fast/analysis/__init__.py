"""Looking at models: measures of their weights and hidden states, saved and drawn; a file a family of measures."""

from repdeg_fast.analysis.admin import plot_table, save_table
from repdeg_fast.analysis.cca import CanonicalCorrelations, cca, pwcca, svcca
from repdeg_fast.analysis.cka import cka_matrix, linear_cka
from repdeg_fast.analysis.cosines import alignment, average_cosine, cosine_histogram, uniformity
from repdeg_fast.analysis.covariances import Covariances
from repdeg_fast.analysis.frequency import frequency_bins, rare_against_frequent
from repdeg_fast.analysis.hidden_states import HiddenStates, collect, stream
from repdeg_fast.analysis.layers import LayerChange, layer_change, token_influence
from repdeg_fast.analysis.metrics import representation_metrics
from repdeg_fast.analysis.mutual_information import mutual_information, mutual_information_of_labels
from repdeg_fast.analysis.neighbours import (
    hubness,
    nearest,
    position_distance,
    position_distance_by_chance,
    token_identity,
)
from repdeg_fast.analysis.procrustes import procrustes
from repdeg_fast.analysis.spectrum import (
    cone_projection,
    directions_for,
    effective_rank,
    isoscore,
    isotropy,
    participation_ratio,
    singular_values,
)

__all__ = [
    "CanonicalCorrelations",
    "Covariances",
    "HiddenStates",
    "LayerChange",
    "alignment",
    "average_cosine",
    "cca",
    "cka_matrix",
    "collect",
    "cone_projection",
    "cosine_histogram",
    "directions_for",
    "effective_rank",
    "frequency_bins",
    "hubness",
    "isoscore",
    "isotropy",
    "layer_change",
    "linear_cka",
    "mutual_information",
    "mutual_information_of_labels",
    "nearest",
    "participation_ratio",
    "plot_table",
    "position_distance",
    "position_distance_by_chance",
    "procrustes",
    "pwcca",
    "rare_against_frequent",
    "representation_metrics",
    "save_table",
    "singular_values",
    "stream",
    "svcca",
    "token_identity",
    "token_influence",
    "uniformity",
]
