"""Linear cross entropy: see ``repdeg_fast/bench/suites/linear_cross_entropy.py`` for the cases and the providers."""

OP = "linear_cross_entropy"


def test_linear_cross_entropy(setting, measure):
    measure(setting)
