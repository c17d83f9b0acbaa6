"""Faults of the measures."""

from .fault import Fault

ANALYSIS = "repdeg_fast/analysis/"

FAULTS = [
    Fault(
        "PWCCA weighs the wrong side where y is narrower",
        ANALYSIS + "cca.py",
        "narrower, cross = (y, cross.T) if y.rank < x.rank else (x, cross)",
        "narrower, cross = (x, cross)",
        "tests/test_similarity.py -k variates_themselves",
    ),
    Fault(
        "merging forgets that origins differ",
        ANALYSIS + "covariances.py",
        "moments += _moved(theirs.T, self._shift(other, j)).T",
        "moments += theirs",
        "tests/test_similarity.py -k streams_and_merges",
    ),
    Fault(
        "influence compares the token that is left out, too",
        ANALYSIS + "layers.py",
        "others = without & (part_of == part)[:, None]",
        "others = mask[rows] & (part_of == part)[:, None]",
        "tests/test_hidden_states.py -k influence_by_hand",
    ),
    Fault(
        "mutual information is not corrected for chance",
        ANALYSIS + "mutual_information.py",
        "entropies[1] * (plug_in - by_chance) / room",
        "entropies[1] * plug_in / entropies[1]",
        "tests/test_degeneration.py -k mutual_information_in_its_limits",
    ),
]
