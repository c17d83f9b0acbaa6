"""Mistakes in the arguments of the linear cross entropy are errors that name the argument."""

import pytest
import torch

from repdeg_fast import linear_cross_entropy, multi_layer_mlm_loss


def call(hidden=(4, 3), weight=(5, 3), target=None, bias=None, **options):
    hidden = torch.randn(hidden) if isinstance(hidden, tuple) else hidden
    weight = torch.randn(weight) if isinstance(weight, tuple) else weight
    target = torch.tensor([0, 1, 2, 3]) if target is None else target
    return lambda: linear_cross_entropy(hidden, weight, target, bias, **options)


def heads(hidden, target=None):
    target = torch.tensor([0, 1]) if target is None else target
    return lambda: multi_layer_mlm_loss(hidden, torch.randn(5, 3), target)


def nested():
    return torch.nested.nested_tensor([torch.tensor([0, 1]), torch.tensor([2, 3])], layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (call(target=torch.tensor([0, 1, 2, 5])), ValueError, r"target: expected values from 0 to 4.*got 5"),
        (call(target=torch.tensor([0, -1, 2, 4])), ValueError, r"target: expected values.*got -1"),
        (call(target=torch.randn(4)), TypeError, "target: expected a tensor of class indices.*float32"),
        (call(target=[0, 1]), TypeError, "target: .*got list"),
        (call(target=torch.tensor([0, 1])), ValueError, r"target: expected shape \(4,\).*got \(2,\)"),
        (call(hidden=(4, 2)), ValueError, "hidden_states: expected a last dimension of 3"),
        (call(hidden=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "hidden_states: expected float32"),
        (call(weight=(5, 3, 1)), ValueError, "weight: expected 2 dimensions"),
        (call(weight=(0, 3)), ValueError, "weight: expected 2 dimensions"),
        (call(weight=torch.randn(5, 3).double()), TypeError, "weight: expected torch.float32 like hidden_states"),
        (call(bias=torch.randn(4)), ValueError, r"bias: expected shape \(5,\)"),
        (call(bias=torch.randn(5).bfloat16()), TypeError, "bias: expected torch.float32.*autocast"),
        (call(weight=torch.randn(5, 3, device="meta")), ValueError, "weight: expected device cpu"),
        (call(label_smoothing=1.1), ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.1"),
        (call(class_weight=torch.ones(4)), ValueError, r"class_weight: expected shape \(5,\)"),
        (call(class_weight=[1.0] * 5), TypeError, "class_weight: expected a tensor, got list"),
        (call(class_weight=torch.ones(5).requires_grad_()), ValueError, "class_weight: .*no gradient.*detach"),
        (call(class_weight=torch.ones(5, device="meta")), ValueError, "class_weight: expected device cpu"),
        (call(lse_square_scale=-1.0), ValueError, "lse_square_scale: expected a number from 0 on"),
        (call(lse_square_scale="a"), TypeError, "lse_square_scale: expected a number, got str"),
        (call(gradient_filter=1.0), ValueError, "gradient_filter: expected None or a probability in.*got 1.0"),
        (call(return_lse="yes"), TypeError, "return_lse: expected True or False, got 'yes'"),
        (call(return_accuracy=1), TypeError, "return_accuracy: expected True or False, got 1"),
        (call(shift=-1), ValueError, "shift: expected a number of positions from 0 on.*got -1"),
        (call(shift=1.5), TypeError, "shift: expected an integer, got float"),
        (call(hidden=(3,), target=torch.tensor(0), shift=True), ValueError, "shift: .*hidden_states"),
        (call(label_smoothing=float("nan")), ValueError, "label_smoothing"),
        (call(label_smoothing="a"), TypeError, "label_smoothing: expected a number, got str"),
        (call(target=torch.tensor([0, 1, 2, 3]).to_sparse()), ValueError, "target: expected a dense tensor.*to_dense"),
        (call(target=nested()), ValueError, "target: expected a dense tensor, got a nested one"),
        (call(softcap=1e39), ValueError, "softcap: expected a number that float32 holds, got 1e.39"),
        (call(softcap=1e-320), ValueError, "softcap: expected a number that float32 holds"),
        (call(ignore_index="-100"), TypeError, "ignore_index: expected an integer, got str"),
        (call(ignore_index=2**63), ValueError, "ignore_index: expected an integer that torch.int64 like target holds"),
        (call(target=torch.tensor([0, 1, 2, 3]).int(), ignore_index=2**32), ValueError, "ignore_index: .*torch.int32"),
        (call(ignore_index=None), TypeError, "ignore_index: expected an integer, got NoneType"),
        (call(padding_idx=1.5), TypeError, "padding_idx: expected an integer, got float"),
        (call(softcap=0.0), ValueError, "softcap: expected a finite number above 0"),
        (call(reduction="max"), ValueError, "reduction: expected one of none, sum, mean"),
        (call(strategy="fast"), ValueError, "strategy: expected one of auto, chunked, streaming"),
        (call(accumulate_dtype=torch.bfloat16), ValueError, "accumulate_dtype: expected torch.float32, got"),
        (call(padding_idx=5), ValueError, "padding_idx: expected a row of weight"),
        (heads([]), ValueError, "hidden_states: expected at least one tensor"),
        (heads([torch.randn(2, 3), torch.randn(3, 3)]), ValueError, r"hidden_states\[1\]: expected shape \(2, 3\)"),
        (heads([torch.randn(2, 3), torch.randn(2, 3).half()]), TypeError, r"hidden_states\[1\]: expected"),
        (heads([torch.randn(2, 3), torch.randn(2, 3).to("meta")]), ValueError, r"states\[1\]: expected device cpu"),
        (heads(torch.randn(2, 3)), ValueError, "hidden_states: expected 3 dimensions"),
        (heads(torch.randn(0, 2, 3)), ValueError, r"hidden_states: .*K at least 1, got shape \(0, 2, 3\)"),
        (heads(None), TypeError, "hidden_states: expected a tensor .* or a sequence .*got NoneType"),
        (heads(torch.randn(1, 3, 3)), ValueError, r"target: expected shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
