"""How a GPU is timed, on one whose time passes when it is told to."""

import dataclasses
import itertools

import pytest
import torch

from repdeg_fast.bench import gpu_timing, measure, runner
from repdeg_fast.bench.suite import FORWARD, FORWARD_BACKWARD, Case, Provider, suites

CPU = torch.device("cpu")
MB = 10**6


class FakeGpu:
    device = CPU

    def __init__(self, refuses=""):
        self.now, self.refuses, self.broken = 0.0, refuses, False

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def stamp(self):
        return self.now

    def ms(self, start, end):
        return end - start

    def capture(self, run):
        if self.refuses:
            raise RuntimeError(self.refuses)
        before = self.now
        run()
        ms, self.now = self.now - before, before
        return lambda: setattr(self, "now", self.now + ms / 2)  # nobody waits for the host


class FakeStep:
    def __init__(self, gpu, ms, log):
        self.gpu, self.ms, self.log = gpu, ms, log

    def reset(self):
        self.log.append(("reset", self.ms))

    def run(self):
        self.log.append(("run", self.ms))
        self.gpu.now += self.ms


@pytest.mark.parametrize(
    ("inputs", "free", "sets"),
    [
        (50 * MB, 80_000 * MB, 3),
        (49 * MB, 80_000 * MB, 4),
        (149 * MB, 80_000 * MB, 2),
        (150 * MB, 80_000 * MB, 1),
        (5_000 * MB, 80_000 * MB, 1),
        (100_000, 80_000 * MB, 128),  # no more than that
        (10 * MB, 120 * MB, 3),  # nor more than a quarter of the memory
        (500 * MB, 120 * MB, 1),
        (0, 80_000 * MB, 128),
    ],
)
def test_the_sets_of_inputs_together_are_three_times_the_cache(inputs, free, sets):
    assert gpu_timing.sets_needed(inputs, cache_bytes=50 * MB, free_bytes=free) == sets


def test_bytes_of_inputs_count_a_storage_once_and_other_devices_never():
    weight = torch.zeros(10, 4)
    tensors = [weight, weight[2:], weight.T, torch.zeros(3), torch.zeros(99, device="meta")]
    assert gpu_timing.bytes_on(CPU, tensors) == 4 * (40 + 3)


def test_a_cpu_needs_no_copies():
    inputs = {"x": torch.zeros(3)}
    assert measure.rotation(suites()["cosreg"], Case("tiny", {"N": 3, "d": 2}), inputs, CPU) == [inputs]


def test_a_gpu_gets_as_many_as_its_cache_asks_for(monkeypatch):
    suite = dataclasses.replace(suites()["cosreg"], make_inputs=lambda case, device: {"x": torch.zeros(3)})
    monkeypatch.setattr(gpu_timing, "bytes_on", lambda device, tensors: 10 * MB)
    monkeypatch.setattr(gpu_timing, "cache_bytes", lambda device: 10 * MB)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 10**12)
    inputs = {"x": torch.ones(3)}
    sets = measure.rotation(suite, Case("tiny", {"N": 3, "d": 2}), inputs, torch.device("cuda"))
    assert len(sets) == 3
    assert sets[0] is inputs
    assert len({one["x"].data_ptr() for one in sets}) == 3


def test_every_set_has_its_turn_and_a_sample_is_the_mean_of_a_turn():
    log, gpu = [], FakeGpu()
    steps = [FakeStep(gpu, ms, log) for ms in (1.0, 2.0, 6.0)]
    timing = gpu_timing.time_in_turn(steps, gpu, seconds=1.0)
    assert timing.method == "graph, 3 sets of inputs"
    assert timing.samples == [1.5] * len(timing.samples)  # half of 9 ms, a third of that
    assert len(timing.samples) == 44  # a fifth of the second
    ran = [ms for what, ms in log if what == "run"]
    assert ran[:3] == ran[-3:] == [1.0, 2.0, 6.0]
    assert len(ran) < 3 + 3 + gpu_timing._MOST_CALLS + 1  # a replay runs nothing on the host
    assert all(("reset", ms) == before for before, (what, ms) in itertools.pairwise(log) if what == "run")


@pytest.mark.parametrize(("ms", "turns"), [(1e-4, 200), (1.0, 100), (50.0, 5)])
def test_repeats_by_the_time_there_is(ms, turns):
    gpu = FakeGpu()
    assert len(gpu_timing.turn_times(lambda: setattr(gpu, "now", gpu.now + ms), gpu, seconds=0.1)) == turns


def test_what_cannot_be_captured_is_timed_with_events_and_says_why():
    gpu = FakeGpu(refuses="called a synchronizing CUDA operation\nException raised from warn_or_error")
    timing = gpu_timing.time_in_turn([FakeStep(gpu, 4.0, [])], gpu, seconds=0.0)
    assert timing.method == "events, 1 set of inputs; not captured: called a synchronizing CUDA operation"
    assert timing.samples == [4.0] * gpu_timing._FEWEST_TURNS


def test_a_gpu_that_a_capture_breaks_is_an_error():
    gpu = FakeGpu(refuses="capture")
    step = FakeStep(gpu, 4.0, [])
    gpu.capture = lambda run: setattr(gpu, "broken", True) or FakeGpu.capture(gpu, run)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_timing.time_in_turn([step], gpu, seconds=0.0)


def test_host_time_is_that_of_a_call_on_an_idle_gpu(monkeypatch):
    now, waits = [0.0], []
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: now[0])

    class Step:
        def reset(self):
            now[0] += 5.0

        def run(self):
            assert waits.pop()
            now[0] += 3e-5

    gpu = FakeGpu()
    gpu.synchronize = lambda: waits.append(True)
    assert gpu_timing.host_microseconds([Step()], gpu, seconds=0.0) == pytest.approx(30)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("wait", "method"),
    [
        (lambda x: None, "graph, 1 set of inputs"),
        (lambda x: x.sum().item(), "events, 1 set of inputs; not captured: called a synchronizing CUDA operation"),
        (lambda x: torch.cuda.synchronize(), "events, 1 set of inputs; not captured: "),  # a capture that fails
    ],
)
def test_on_a_gpu(wait, method):
    x = torch.randn(64, 64, device="cuda", requires_grad=True)

    def call():
        wait(x)
        return (x * torch.rand_like(x)).sum()

    provider = Provider("any", lambda inputs: call)
    step = measure.Step(provider, call, {"x": x}, FORWARD_BACKWARD)
    timing = gpu_timing.time_in_turn([step], gpu_timing.gpu(torch.device("cuda")), seconds=0.1)
    assert timing.method.startswith(method)
    assert all(ms > 0 for ms in timing.samples)
    assert measure.lost(torch.device("cuda")) is None
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator waits for no capture to end


def breaks(inputs):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def provider(name, **options):
    return Provider(name, lambda inputs: lambda: inputs["weight"].square().sum(), **options)


@pytest.fixture
def measured(monkeypatch):
    """The rows of providers that are run as on a GPU, after one named ``lost`` of which nothing runs any more."""
    gpu, ran = FakeGpu(), []
    monkeypatch.setattr(gpu_timing, "gpu", lambda device: gpu)
    monkeypatch.setattr(measure, "lost", lambda device: "failed: CUDA error" if "lost" in ran else None)

    def run(*providers):
        suite, case = suites()["cosreg"], Case("tiny", {"N": 30, "d": 4})
        inputs = suite.make_inputs(case, CPU)
        monkeypatch.setattr(measure, "rotation", lambda *_: [inputs, suite.make_inputs(case, CPU)])
        rows = {one: runner._rows(suite, case, one, CPU, {}) for one in providers}
        note = lambda text, steps=1: ran.append(text.split()[1].rstrip(":")) if text.endswith("ready") else None  # noqa: E731
        runner._one_by_one(rows, inputs, suite.exact(inputs), CPU, 0.0, note)
        return ran, {one.name: of_provider for one, of_provider in rows.items()}

    return run


def test_ours_come_first_and_other_packages_last(measured):
    ran, rows = measured(provider("peer", peer="a-package"), provider("eager"), provider("ours", ours=True))
    assert ran == ["ours", "eager", "peer"]
    for row in itertools.chain(*rows.values()):
        assert row.timing == "graph, 2 sets of inputs"
        assert row.samples
        assert row.host_us > 0
        assert row.failed is False
    assert [row.pass_ for row in rows["ours"]] == [FORWARD, FORWARD_BACKWARD]


def test_one_that_breaks_the_gpu_costs_those_after_it(measured):
    lost = provider("lost")
    object.__setattr__(lost, "prepare", breaks)
    ran, rows = measured(provider("ours", ours=True), lost, provider("peer", peer="a-package"))
    assert ran == ["ours", "lost"]
    assert all(row.samples and row.reason is None for row in rows["ours"])
    assert {row.reason for row in rows["lost"]} == {
        "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    }
    for row in rows["peer"]:
        assert row.reason == "not run: lost broke this process's GPU (failed: CUDA error)"
        assert row.failed
        assert not row.samples


def test_a_case_without_inputs_is_rows_with_the_reason(monkeypatch):
    def too_large(case, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    suite = suites()["cosreg"]
    monkeypatch.setattr(runner.measure, "roof", too_large)
    (rows,) = runner.run(suite, [Case("huge", {"N": 3, "d": 2})], [provider("ours", ours=True)], CPU, 0.0)
    assert {row.reason for row in rows} == {"failed: OutOfMemoryError: CUDA out of memory"}
    assert all(row.failed and row.as_json()["ms_median"] is None for row in rows)
