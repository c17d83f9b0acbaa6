"""Faults of operators, definitions, modules and the choice of backends."""

from .fault import Fault

FAULTS = [
    Fault(
        "what the gradient filter leaves goes to other rows of the weight",
        "repdeg_fast/ops/products.py",
        "self.total.index_add_(0, part,",
        "self.total.index_add_(0, part.flip(0),",
        "tests/test_linear_cross_entropy_extras.py -k 'spares and chunked'",
    ),
    Fault(
        "the mean of a z-loss is over the weights of classes",
        "repdeg_fast/ops/linear_cross_entropy.py",
        "share = z_loss_share(head.target, rule.ignore_index, mean, grad_loss.dtype)",
        "share = kernels.share(head, rule, mean)",
        "tests/test_linear_cross_entropy_extras.py -k 'reference and weigh_differently and mean'",
    ),
    Fault(
        "matrices that do not start on 16 bytes reach the kernels",
        "repdeg_fast/backends.py",
        "matrix.data_ptr() % 16 or any",
        "any",
        "tests/test_cosreg.py -k 'strides and emulated'",
    ),
    Fault(
        "dropout counts in eval mode",
        "repdeg_fast/nn/admin/profile.py",
        "kept = 1 - norm.dropout if norm.training else 1.0",
        "kept = 1 - norm.dropout",
        "tests/test_admin_init.py -k while_training_only",
    ),
    Fault(
        "nine rounds of Philox",
        "repdeg_fast/reference/philox.py",
        "_ROUNDS = 10",
        "_ROUNDS = 9",
        "tests/test_philox.py",
    ),
    Fault(
        "each pair of rows is met twice",
        "repdeg_fast/ops/pairwise_blocks.py",
        "slice(rows.start if self.symmetric else 0, None)",
        "slice(0, None)",
        "tests/test_pairwise.py -k 'values_and_gradients and cut and cpu'",
    ),
    Fault(
        "a buffer that is too small serves again",
        "repdeg_fast/ops/buffers.py",
        "kept.numel() >= size:",
        "kept.numel() > 0:",
        "tests/test_linear_cross_entropy_memory.py -k kept_on_the_cpu",
    ),
    Fault(
        "16-bit sums are added up by a kernel for wide ones",
        "repdeg_fast/native/linear_cross_entropy.py",
        "if total.dtype == arithmetic_dtype(product):",
        "if True:",
        "tests/test_linear_cross_entropy_numerics.py -k sums_over_chunks",
    ),
    Fault(
        "the last position of a sequence predicts the next one's first",
        "repdeg_fast/functional/_head_arguments.py",
        "return F.pad(target[..., steps:], (0, steps), value=ignore_index)",
        "return target.flatten().roll(-steps).view(target.shape)",
        "tests/test_linear_cross_entropy_extras.py -k 'shift and reference'",
    ),
]
