"""ADMIN's residual block: see ``repdeg_fast/bench/suites/admin_norm.py`` for the cases and the providers."""

OP = "admin_norm"


def test_admin_norm(setting, measure):
    measure(setting)
