"""A pytest plugin for `make gpu` (``-p gpu_session``): the most telling tests first, since time may run out, and a
process whose GPU is broken ends, since all its other tests would fail for that alone."""

import os

import pytest
import torch

_lost = []  # the first test after which no kernel ran any more


@pytest.hookimpl(trylast=True)  # of what is left
def pytest_collection_modifyitems(items):
    """The first test of each file, then the second of each, and so on: files begin with what matters most. Those of the
    reference last: PyTorch's own kernels."""
    positions = {}
    for item in items:
        functions = positions.setdefault(item.path, {})
        functions.setdefault(item.originalname, len(functions))
    items.sort(key=lambda item: ("reference-gpu" in item.name, positions[item.path][item.originalname]))


def pytest_runtest_logreport(report):
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and _gpu_is_lost():
        _lost.append(report.nodeid)


@pytest.hookimpl(trylast=True)  # the report is on its way by then
def pytest_runtest_logfinish(nodeid):
    """After an illegal address, say, every call fails: pytest-xdist starts another process, and says of this test that
    it crashed its worker."""
    if _lost:
        os._exit(1)


def _gpu_is_lost():
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
