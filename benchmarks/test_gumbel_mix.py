"""Gumbel mixing: see ``repdeg_fast/bench/suites/gumbel_mix.py`` for the cases and the providers."""

OP = "gumbel_mix"


def test_gumbel_mix(setting, measure):
    measure(setting)
