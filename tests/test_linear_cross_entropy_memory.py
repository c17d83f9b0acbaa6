"""What the linear cross entropy holds in memory, and how it chooses by that."""

import builtins
import os

import pytest
import torch
from helpers import saved_bytes
from linear_cross_entropy_cases import STRATEGIES, inputs
from torch.profiler import ProfilerActivity, profile

from repdeg_fast import linear_cross_entropy, multi_layer_mlm_loss
from repdeg_fast.contracts.linear_cross_entropy import Wanted
from repdeg_fast.ops import buffers, chunked_logits
from repdeg_fast.ops import linear_cross_entropy as ops


def test_saves_the_gradients_or_one_value_a_row():
    hidden, weight, target, bias = inputs(127, 64, 40, heads=3)
    for strategy, most in (("chunked", 4 * (3 * 64 * 40 + 127 * 40 + 127)), ("streaming", 4 * 3 * 64)):
        call = lambda s=strategy: multi_layer_mlm_loss(hidden, weight, target, bias, strategy=s)  # noqa: E731
        assert 0 < saved_bytes(call, hidden, weight, target, bias) <= most


def peak_bytes(function):
    """The most that PyTorch's CPU allocator held at once during ``function``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_peak_memory(strategy, number, threads):
    """Beyond the gradients, at most 64 MiB; the logits would be 313 MB. The backward pass adds nothing to that."""
    threads(number)
    buffers.release()
    hidden, weight, target, bias = inputs(30522, 2560, 128)
    gradients = sum(t.nbytes for t in (hidden, weight, bias))

    def step():
        linear_cross_entropy(hidden, weight, target, bias, strategy=strategy).backward()

    assert 3 * (gradients + (64 << 20)) < 2560 * 30522 * 4
    step()  # the first call with a number of threads measures how products are best made, in memory of its own
    hidden.grad = weight.grad = bias.grad = None
    buffers.release()
    assert gradients < peak_bytes(step) <= gradients + (64 << 20)


def test_the_buffer_is_kept_on_the_cpu():
    """Between calls, for either kind, never more than the limit; results do not depend on what is in it."""
    buffers.release()
    hidden, weight, target, bias = inputs(2000, 64, 16)
    first = linear_cross_entropy(hidden, weight, target, bias)
    (kept,) = buffers._kept.values()
    kept.fill_(torch.nan)
    with torch.inference_mode():
        assert linear_cross_entropy(hidden, weight, target, bias) == first
    loss = linear_cross_entropy(hidden, weight, target, bias)
    loss.backward()
    assert loss == first
    assert hidden.grad.isfinite().all()
    kept = buffers._kept[torch.float32]
    assert kept.nbytes <= buffers.LIMIT["cpu"]
    assert not kept.is_inference()
    buffers.keep(torch.empty(10))
    assert linear_cross_entropy(hidden, weight, target, bias) == first  # in a new one: that is too small
    assert buffers._kept[torch.float32].numel() > 10
    buffers.release()
    assert not buffers._kept


def test_chunk_positions(threads):
    threads(2)
    weight = torch.empty(30522, 768)
    call = lambda positions, dtype=torch.float32, heads=1: chunked_logits.chunk_positions(  # noqa: E731
        positions, heads, weight.to(dtype), dtype, Wanted(True, True, True, torch.float32)
    )
    assert call(1536) == 512  # three chunks of equal size, 63 MB each
    assert call(512, heads=3) == 171  # three chunks as well, of 171, 171 and 170
    assert call(100) == 100
    assert call(1536, torch.bfloat16) == 1536  # one chunk is smaller than an fp32 copy of the gradient
    assert call(4096, torch.bfloat16) * 30528 * 2 <= 64 << 20


def test_chunks_of_a_gpu_fill_its_multiprocessors():
    """dz E at d = 768 has three tiles for each 128 rows: 132 at 5,632 rows."""
    cut = chunked_logits._full_waves
    assert cut(5632, 768, 1, 132) == 1
    assert cut(11_264, 768, 2, 132) == 2  # two full rounds
    assert cut(14_745, 768, 1, 132) == 1  # 348 tiles, three rounds; in two chunks two each
    assert cut(14_745, 768, 2, 132) == 3
    weight, wanted = torch.empty(32_768, 768, device="meta"), Wanted(True, True, True, torch.float32)
    positions = lambda n: chunked_logits.chunk_positions(n, 1, weight, torch.bfloat16, wanted)  # noqa: E731
    assert positions(14_745) == 14_745  # 966 MB
    assert positions(44_235) == 11_059  # 2.9 GB: four chunks of two rounds rather than three of three


def test_tiles_of_a_known_log_sum_exp():
    size = lambda rows, weight, *dtypes: chunked_logits.tile_size(rows, weight, set(dtypes))  # noqa: E731
    assert size(14_745, torch.empty(30_522, 8), torch.float32) == (4096, 4096)
    on_gpu = size(14_745, torch.empty(30_522, 8, device="meta"), torch.float32, torch.bfloat16)
    assert on_gpu.columns == 10_176  # three tiles of about equal size
    assert 14_745 <= on_gpu.rows <= (1 << 30) // (6 * on_gpu.columns)
    assert size(10**6, torch.empty(250_002, 8, device="meta"), torch.float32).columns <= 4096 + 64


def test_choose_strategy():
    choose = lambda dtype=torch.float32, known=True, memory=None: ops.choose_strategy(  # noqa: E731
        1536, 30522, 768, dtype, upstream_known=known, buffer_bytes=64 << 20, memory=memory
    )
    assert choose() == "chunked"
    assert choose(memory=8 << 30) == "chunked"
    assert choose(memory=600 << 20) == "streaming"  # 166 MB of buffer and gradients
    assert choose(known=False) == "streaming"
    assert choose(dtype=torch.float16) == "streaming"


def test_a_call_asks_the_system_for_nothing(monkeypatch):
    """The size of the device is looked up once; what is free on it, never."""

    def step():
        hidden, weight, target, bias = inputs(30, 10, 8)
        linear_cross_entropy(hidden, weight, target, bias).backward()

    def fail(*_, **__):
        raise AssertionError("asked")

    step()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fail)
        for name in ("open", "stat", "sysconf"):
            patch.setattr(os, name, fail)
        for name in ("get_device_properties", "mem_get_info", "memory_stats"):
            patch.setattr(torch.cuda, name, fail)
        step()
