"""Every suite of ``repdeg_fast/bench/suites/``: each case and provider is one benchmark (see ``conftest.py``)."""


def test_suites(setting, measure):
    measure(setting)
