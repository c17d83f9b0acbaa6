"""Host time of a call beside eager PyTorch's."""

import torch
from typer.testing import CliRunner

from repdeg_fast.bench import overhead
from repdeg_fast.cli.app import app

CPU = torch.device("cpu")


def test_both_forms_of_a_pair_compute_the_same():
    """Up to what noise decides."""
    for pair in overhead.pairs(CPU):
        ours, eager = pair.ours(), pair.eager()
        assert ours.shape == eager.shape == ()
        if pair.name != "gumbel_mix":
            torch.testing.assert_close(ours, eager)


def test_a_row_of_the_table():
    (found,) = [row for row in overhead.measure(CPU, 0.0) if row.pair.name == "cosine_regularization"]
    assert found.eager_us > 0
    assert 0 < found.ratio < 10
    assert 2 <= found.ours_kernels < found.eager_kernels


def test_command():
    result = CliRunner().invoke(app, ["bench", "--overhead", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    for pair in overhead.pairs(CPU):
        assert pair.name in result.output
