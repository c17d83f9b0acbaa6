"""Random numbers: the published generator, the same bits on every backend, the right distribution."""

import math

import pytest
import torch

from repdeg_fast._seeds import seed_tensor
from repdeg_fast.native import build
from repdeg_fast.reference import philox

SEED = torch.tensor([0x299F31D0A4093822])
BLOCK = (range(3, 70), range(40, 143))  # neither starts at 0, nor are the sizes multiples of anything


@pytest.fixture(scope="module")
def native_philox():
    if reason := build.unavailable("cpu"):
        pytest.skip(reason)
    build.load("cpu")
    return build.operators("philox", "words", "gumbel")


# Known answers published with the generator (Random123, philox4x32-10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert tuple(word.item() for word in philox.philox(counter, key)) == expected


def test_words_are_laid_out_as_counter_and_lane():
    block = philox.words(SEED, range(5, 7), range(6, 9), stream=3)
    for i, row in enumerate((5, 6)):
        for j, column in enumerate((6, 7, 8)):
            lanes = philox.philox((column // 4, row, 3, 0), (0xA4093822, 0x299F31D0))
            assert block[i, j] == lanes[column % 4]


@pytest.mark.cpp
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
def test_native_words_have_the_reference_bits(native_philox, seed):
    rows, columns = BLOCK
    seed = seed_tensor(seed, torch.device("cpu"))
    block = native_philox.words(seed, rows.start, len(rows), columns.start // 4, len(columns), 1)
    assert torch.equal(block, philox.words(seed, rows, columns, stream=1))


@pytest.mark.cpp
def test_counters_beyond_31_bits(native_philox):
    rows, columns = range(2**32 - 2, 2**32), range(2**32 - 8, 2**32)
    block = native_philox.words(SEED, rows.start, 2, columns.start // 4, 8, 0)
    assert torch.equal(block, philox.words(SEED, rows, columns, stream=0))


@pytest.mark.cpp
def test_native_gumbel_is_accurate_in_both_tails(native_philox):
    rows, columns = range(64), range(1 << 16)
    exact = philox.gumbel(SEED, rows, columns, dtype=torch.float64)
    assert exact.max() > 13  # the sample reaches u near 1, where log u needs all its bits
    noise = native_philox.gumbel(SEED, 0, len(rows), 0, len(columns), philox.GUMBEL_STREAM)
    assert ((noise - exact).abs() / exact.abs().clamp_min(1)).max() < 4e-7


def test_a_block_does_not_depend_on_how_it_is_cut():
    rows, columns = BLOCK
    whole = philox.words(SEED, range(rows.stop), range(columns.stop), stream=0)
    assert torch.equal(philox.words(SEED, rows, columns, stream=0), whole[rows.start :, columns.start :])


@pytest.mark.parametrize("size", [1, 5, 48])
def test_nor_on_how_many_words_are_made_at_a_time(monkeypatch, size):
    make = lambda: philox.words(SEED, *BLOCK, stream=0)  # noqa: E731
    whole = make()
    monkeypatch.setattr(philox, "block_size", lambda device: size)
    assert torch.equal(make(), whole)


def test_streams_seeds_and_rows_differ():
    blocks = [
        philox.words(SEED, range(64), range(64), stream=0),
        philox.words(SEED, range(64), range(64), stream=1),
        philox.words(SEED + 1, range(64), range(64), stream=0),
        philox.words(SEED + 2**32, range(64), range(64), stream=0),
    ]
    assert torch.cat([block.flatten() for block in blocks]).unique().numel() > 4 * 64 * 64 - 8


def test_uniform_stays_inside_the_open_interval():
    for word in (0, 2**32 - 1):  # the smallest and the largest word, through the same arithmetic
        u = (torch.tensor(word >> 9).float() + 0.5) * 2.0**-23
        assert 0 < u < 1
        assert math.isfinite(-math.log(-math.log(u)))
        assert u.double() == ((word >> 9) + 0.5) / 2**23  # exact


def test_statistics():
    u = philox.uniform(SEED, range(512), range(2048), stream=0).double()
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = torch.histc(u, bins=256, min=0, max=1)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert chi_square < 255 + 5 * math.sqrt(2 * 255)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):  # neighbours do not correlate
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 / math.sqrt(n)
    noise = philox.gumbel(SEED, range(512), range(2048)).double()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    assert abs(philox.dropout_mask(SEED, range(512), range(2048), 0.1).double().mean() - 0.9) < 5 * math.sqrt(0.09 / n)


def test_dropout_extremes():
    assert philox.dropout_mask(SEED, range(64), range(64), 0.0).all()
    assert not philox.dropout_mask(SEED, range(64), range(64), 1.0).any()


def test_dropout_keeps_where_u_is_p_or_more():
    rows, columns = range(40), range(50)
    u = philox.uniform(SEED, rows, columns, philox.DROPOUT_STREAM)
    values = u.flatten()[:3].tolist()  # what is equal to p is kept, and nothing below, even by half a step
    for p in (0.1, 1 / 3, 0.999, *values, *(u - 2.0**-24 for u in values), *(u + 2.0**-24 for u in values)):
        rounded = torch.tensor(p, dtype=torch.float64).float()
        assert torch.equal(philox.dropout_mask(SEED, rows, columns, p), u >= rounded)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [0, -1, 0x299F31D0A4093822])
def test_triton_words_have_the_reference_bits(seed):
    from philox_kernel import block_kernel
    from repdeg_fast.triton_kernels import philox as triton_philox

    rows, columns = range(3, 19), range(40, 72)
    seed = seed_tensor(seed, torch.device("cpu"))
    words, noise = torch.empty(16, 32, dtype=torch.int64), torch.empty(16, 32)
    block_kernel[(1,)](seed, words, noise, rows.start, columns.start, stream=1, ROWS=16, COLUMNS=32)
    assert torch.equal(words, philox.words(seed, rows, columns, stream=1))
    torch.testing.assert_close(noise, philox.gumbel(seed, rows, columns), rtol=1e-6, atol=1e-6)
    assert triton_philox.GUMBEL_STREAM.value == philox.GUMBEL_STREAM
    assert triton_philox.DROPOUT_STREAM.value == philox.DROPOUT_STREAM


class TestSeeds:
    cpu = torch.device("cpu")

    def test_kinds(self):
        given = torch.tensor(7)
        assert seed_tensor(given, self.cpu) is given
        assert seed_tensor(7, self.cpu).item() == 7
        assert seed_tensor(2**64 - 1, self.cpu).item() == -1  # the same 64 bits

    def test_none_draws_from_torchs_generator(self):
        torch.manual_seed(0)
        first, second = seed_tensor(None, self.cpu), seed_tensor(None, self.cpu)
        torch.manual_seed(0)
        assert torch.equal(seed_tensor(None, self.cpu), first)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(
        ("seed", "error", "words"),
        [
            (1.0, TypeError, "float"),
            (True, TypeError, "bool"),
            (2**64, ValueError, "64 bits"),
            (torch.tensor(1.0), TypeError, "float32"),
            (torch.tensor([1, 2]), ValueError, r"one element.*\(2,\)"),
            (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "device cpu"),
        ],
    )
    def test_errors_name_the_argument(self, seed, error, words):
        with pytest.raises(error, match=f"seed: .*{words}"):
            seed_tensor(seed, self.cpu)
