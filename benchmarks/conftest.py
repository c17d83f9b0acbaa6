"""pytest-benchmark over the suites of ``repdeg_fast.bench``: ``pytest benchmarks --benchmark-only`` runs one case of
each on a CPU, the default cases on a GPU; ``--ops``, ``--cases`` and ``--providers`` choose others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from repdeg_fast.bench import runner
from repdeg_fast.bench.suite import TOLERANCE, Case, Inputs, Provider, Suite, select

ROUNDS = 7


def pytest_addoption(parser):
    group = parser.getgroup("repdeg-fast")
    group.addoption("--ops", default="", help="operations with commas between; default: all")
    group.addoption("--cases", default="", help="cases with commas between; default: one on a CPU, several on a GPU")
    group.addoption("--providers", default="", help="providers with commas between; default: all")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


@dataclass(frozen=True, eq=False)
class Setting:
    suite: Suite
    case: Case
    provider: Provider
    pass_: str
    device: torch.device


def pytest_generate_tests(metafunc):
    if "setting" not in metafunc.fixturenames:
        return
    option = lambda name: [item for item in metafunc.config.getoption(name).split(",") if item]  # noqa: E731
    device = torch.device(metafunc.config.getoption("--device"))
    settings = {
        f"{chosen.suite.op}-{case.name}-{provider.name}-{pass_}": Setting(chosen.suite, case, provider, pass_, device)
        for chosen in select(option("--ops"), option("--cases"), option("--providers"), device)
        for case in (chosen.cases if option("--cases") or device.type == "cuda" else chosen.cases[:1])
        for provider in chosen.providers
        for pass_ in provider.passes
    }
    metafunc.parametrize("setting", settings.values(), ids=settings.keys())


@functools.lru_cache(maxsize=1)  # the tests of one case follow each other
def _inputs(suite: Suite, case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    torch._dynamo.reset()
    inputs = suite.make_inputs(case, device)
    return inputs, suite.exact(inputs)


@pytest.fixture
def measure(benchmark) -> Callable[[Setting], None]:
    """Check a provider's value where that can be, then time one pass of it."""

    def run(setting: Setting) -> None:
        inputs, exact = _inputs(setting.suite, setting.case, setting.device)
        step, facts = runner.prepare(setting.suite, setting.case, setting.provider, inputs, exact, setting.device)
        if step is None:
            assert not (facts.get("failed") and setting.provider.ours), facts["reason"]
            pytest.skip(facts["reason"])
        assert setting.provider.unchecked or facts["error"] <= TOLERANCE[setting.case.dtype]
        step = step.of_pass(setting.pass_)
        work = setting.suite.work(setting.case, setting.pass_, setting.provider.graph_free)
        benchmark.group = f"{setting.suite.op} {setting.case.name} {setting.pass_}"
        benchmark.extra_info.update(bytes=work.bytes, flops=work.flops, saved_bytes=facts.get("saved_bytes"))

        def timed() -> None:
            step.run()
            if setting.device.type == "cuda":
                torch.cuda.synchronize(setting.device)

        benchmark.pedantic(timed, setup=step.reset, rounds=ROUNDS, warmup_rounds=1)
        for leaf in step.leaves:
            leaf.grad = None

    return run
