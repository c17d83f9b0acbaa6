"""Options that other packages have, too, mean what they mean there: their kernels on the same numbers."""

import pytest
import torch
from helpers import relative_error
from linear_cross_entropy_cases import inputs

from repdeg_fast import linear_cross_entropy


@pytest.mark.interpreter
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_z_loss_predictions_and_accuracy_of_liger(smoothing):
    """(In Triton's interpreter it fails with class weights, whose sum it takes for a tensor.)"""
    liger = pytest.importorskip("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    hidden, weight, target, _ = inputs(33, 9, 5)
    target[0] = torch.nn.functional.linear(hidden, weight)[0].argmax()
    logits = torch.nn.functional.linear(hidden, weight)
    flags, options = (True, True, True), {"lse_square_scale": 0.1, "label_smoothing": smoothing}
    theirs = liger.apply(
        logits.clone(), target, None, -100, 0.1, smoothing, "mean", None, *flags
    )  # fmt: skip
    ask = {"return_z_loss": True, "return_predictions": True, "return_accuracy": True}
    ours = linear_cross_entropy(hidden, weight, target, **options, **ask)
    for mine, right in zip((ours.loss, ours.z_loss, ours.accuracy), theirs, strict=False):
        assert relative_error(mine, right) <= 1e-6
    counts = target != -100  # elsewhere theirs is -1
    assert torch.equal(ours.predictions[counts], theirs[3][counts])
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours.loss, theirs[0]))
    for mine, right in zip(*gradients, strict=True):
        assert relative_error(mine, right) <= 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift_and_softcap_of_cut_cross_entropy(reduction):
    cut_cross_entropy = pytest.importorskip("cut_cross_entropy")
    hidden, weight, target, _ = inputs(50, 3 * 8, 6)
    folded, labels = hidden.view(3, 8, 6), target.view(3, 8)
    options = {"shift": True, "softcap": 3.0, "reduction": reduction}
    with torch.compiler.set_stance("force_eager"):
        theirs = cut_cross_entropy.linear_cross_entropy(folded, weight, labels, impl="torch_compile", **options)
        right = torch.autograd.grad(theirs.sum(), (hidden, weight))
    ours = linear_cross_entropy(folded, weight, labels, **options)
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= 1e-6
    for mine, other in zip(torch.autograd.grad(ours.sum(), (hidden, weight)), right, strict=True):
        assert relative_error(mine, other) <= 1e-5
