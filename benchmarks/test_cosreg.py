"""CosReg: see ``repdeg_fast/bench/suites/cosreg.py`` for the cases and the providers."""

OP = "cosreg"


def test_cosreg(setting, measure):
    measure(setting)
