"""Losses and sample of AMOS's heads: see ``repdeg_fast/bench/suites/mlm_losses_and_sample.py``."""

OP = "mlm_losses_and_sample"


def test_mlm_losses_and_sample(setting, measure):
    measure(setting)
