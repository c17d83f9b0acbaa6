"""How launchers choose their configuration, and how tuning finds the fastest one: both without a GPU."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")
from repdeg_fast.triton_kernels import tuning

from repdeg_fast import backends
from repdeg_fast.bench import tune
from repdeg_fast.bench.suite import Case, Provider, Selection, suites
from repdeg_fast.cli.app import app


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int
    num_warps: int


CONFIGS = (Config(64, 8), Config(32, 4))
QUESTION = "op.kernel float32 n<=128 d<=16"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_tuned", {})
    return tmp_path / "folder" / "tuning.json"


def choose(n=100, d=16):
    return tuning.choose("op.kernel", CONFIGS, torch.zeros(1), n=n, d=d)


def test_the_first_configuration_without_a_file(file):
    tuning.load(file)
    assert choose() == CONFIGS[0]


def test_what_was_found_is_used_for_its_device_and_sizes(file):
    tuning.remember(file, "another", QUESTION, CONFIGS[1])
    tuning.load(file)
    assert choose() == CONFIGS[0]
    tuning.remember(file, "cpu", QUESTION, CONFIGS[1])
    tuning.load(file)
    assert choose() == choose(n=65) == CONFIGS[1]
    assert choose(n=129) == choose(d=17) == choose(n=64) == CONFIGS[0]
    assert [path.name for path in file.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"cpu": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(file, content):
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match=r"ignored, .*tuning\.json cannot be read .*delete it"):
        tuning.load(file)
    assert choose() == CONFIGS[0]
    with pytest.warns(RuntimeWarning):
        tuning.remember(file, "cpu", QUESTION, CONFIGS[1])
    tuning.load(file)
    assert choose() == CONFIGS[1]


@pytest.mark.parametrize("entry", [{"rows": 48, "num_warps": 4}, {"columns": 3}, 7, None])
def test_what_is_not_listed_is_never_launched(file, entry):
    file.parent.mkdir()
    file.write_text(json.dumps({"cpu": {QUESTION: entry}}))
    tuning.load(file)
    assert choose() == CONFIGS[0]


def trial(ms, config):
    return tune.Trial(QUESTION, config, ms, None if ms else "failed")


@pytest.mark.parametrize(
    ("ms", "best"),
    [((2.0, 1.0), 1), ((1.0, 2.0), 0), ((1.0, 0.99), 0), ((1.0, None), 0), ((None, 1.0), 1), ((None, None), 0)],
)
def test_fastest(ms, best):
    assert tune.fastest([trial(*pair) for pair in zip(ms, CONFIGS, strict=True)]) == CONFIGS[best]


class TestTuning:
    """The loop, in the interpreter, with a clock of its own."""

    pytestmark = pytest.mark.interpreter

    @pytest.fixture
    def selection(self):
        suite = suites()["cosreg"]
        providers = [p for p in suite.providers if p.name in ("ours-triton", "eager")]
        return Selection(suite, [Case("small", {"N": 40, "d": 24})], providers)

    @staticmethod
    def timer(faster):
        """A step takes 10 ms, less where it launches the kernel ``faster[0]`` in configuration ``faster[1]``."""

        def time(steps):
            ms, answer = [10.0], tuning._answer

            def watch(question, configurations):
                chosen = answer(question, configurations)
                if question.startswith(faster[0]) and chosen == configurations[faster[1]]:
                    ms[0] = 5.0
                return chosen

            with tuning.answering(watch):
                steps[0].run()
            return ms[0]

        return time

    def run(self, selection, file, timer):
        return list(tune.tune([selection], torch.device("cpu"), timer, file))

    def test_the_fastest_is_kept_and_then_used(self, selection, file):
        groups = self.run(selection, file, self.timer(("cosreg.backward", 1)))
        assert [g[0].question for g in groups] == [
            "cosreg.forward float32 n<=64 d<=32",
            "cosreg.backward float32 n<=64 d<=32",
        ]
        assert all(t.ms is not None for group in groups for t in group)
        assert tune.fastest(groups[1]) == groups[1][1].configuration != groups[1][0].configuration
        assert list(json.loads(file.read_text())["cpu"]) == [groups[1][0].question]
        tuning.load(file)
        like = torch.zeros(1)
        listed = [t.configuration for t in groups[1]]
        assert tuning.choose("cosreg.backward", listed, like, n=40, d=24) == listed[1]

    def test_wrong_values_and_failures_are_out(self, selection, file, monkeypatch):
        from repdeg_fast.triton_kernels import cosreg

        right = cosreg.forward

        def forward(rows):
            tile = tuning.choose("cosreg.forward", cosreg._tiles(cosreg._FORWARD, 24), rows.weight, n=40, d=24)
            if tile == cosreg._tiles(cosreg._FORWARD, 24)[1]:
                raise RuntimeError("out of resource: shared memory")
            value, *rest = right(rows)
            return (value * 2 if tile == cosreg._tiles(cosreg._FORWARD, 24)[2] else value, *rest)

        monkeypatch.setattr(cosreg, "forward", forward)
        forward_trials = self.run(selection, file, self.timer(("cosreg.forward", 2)))[0]
        assert [t.ms for t in forward_trials] == [10.0, None, None]
        assert "out of resource" in forward_trials[1].reason
        assert "other values" in forward_trials[2].reason
        assert not file.exists()

    @pytest.mark.parametrize(
        ("op", "sizes", "kernels"),
        [
            ("admin_norm", {"N": 9, "d": 24, "dropout_percent": 0}, ["admin_norm.forward", "admin_norm.backward"]),
            ("linear_cross_entropy", {"K": 2, "M": 5, "V": 70, "d": 24}, ["linear_cross_entropy.rows"]),
        ],
    )
    def test_every_listed_configuration_gives_the_same_values(self, file, op, sizes, kernels):
        suite = suites()[op]
        selection = Selection(suite, [Case("small", sizes, tokens=5)], list(suite.providers))
        groups = self.run(selection, file, lambda step: 1.0)
        assert [group[0].question.split()[0] for group in groups] == kernels
        assert [trial.reason for group in groups for trial in group if trial.ms is None] == []

    def test_only_triton_is_tuned(self, selection, file):
        others = [Provider("eager", lambda inputs: pytest.fail("was run"))]
        assert self.run(dataclasses.replace(selection, providers=others), file, self.timer(("", 0))) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_the_command_says_that_it_needs_a_gpu():
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2
    assert "needs a GPU" in result.stderr


def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    assert backends.tuning_file() == tmp_path / "tuning.json"


@pytest.mark.gpu
def test_tuning_on_a_gpu(file, monkeypatch):
    monkeypatch.setattr(backends, "tuning_file", lambda: file)
    result = CliRunner().invoke(app, ["tune", "--ops", "cosreg", "--cases", "literal-8192", "--seconds", "0.1"])
    assert result.exit_code == 0, result.output
    assert "cosreg.forward" in result.output
