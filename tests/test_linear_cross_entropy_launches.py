"""How many kernels a GPU is asked for beside the products, seen on meta tensors: each costs the host 2 to 3 µs."""

import os

import kernel_launches
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repdeg_fast.contracts.linear_cross_entropy import Gradients, Head, LossRule, Upstream, Wanted
from repdeg_fast.ops import linear_cross_entropy as ops

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
pytest.importorskip("triton")

VIEWS = {"view", "expand", "t", "slice", "select", "unsqueeze", "as_strided", "alias", "unbind", "detach"}
MEMORY = {"empty", "new_empty"}


class Computing(TorchDispatchMode):
    """Counts PyTorch's operators that are kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in VIEWS | MEMORY:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def launched(call):
    with kernel_launches.recorded() as kernels, Computing() as operators:
        call()
    return [*operators.names, *(kernel.kernel.__name__ for kernel in kernels)]


@pytest.fixture
def problem():
    """K = 3, without a bias, and the kernels that Triton has for it."""
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    head = Head(empty(12, 8), empty(64, 8), empty(4, dtype=torch.int64), None)
    return ops.operation.triton(), head, LossRule(-100, 0.0, 0.0), Wanted(True, True, False, torch.float32), empty


def test_forward(problem):
    kernels, head, rule, wanted, _ = problem

    def losses():
        share = kernels.share(head, rule, True)
        loss, _, _ = kernels.forward_backward(Upstream(share.expand(12)), head, rule, wanted)
        kernels.total(loss, 3, share)

    assert sorted(launched(losses)) == ["_rows_kernel", "_share_kernel", "_total_kernel", "mm", "mm", "mm"]


def test_rescaling_asks_nothing_of_the_device(problem):
    """Two gradients are scaled, and what is a sum over heads is made again where the device finds that it must be."""
    kernels, head, rule, wanted, empty = problem
    made = Gradients(head.hidden_states, head.weight, None)
    found = launched(lambda: kernels.rescale_(made, empty(3), lambda: Upstream(empty(12)), head, rule, wanted))
    assert found == ["_scale_kernel", "_scale_kernel", "_forward_kernel", "_combine_kernel", "_vocabulary_kernel"]
    alone = launched(lambda: kernels.rescale_(made, empty(1), lambda: Upstream(empty(12)), head, rule, wanted))
    assert alone == ["_scale_kernel", "_scale_kernel"]


def test_streaming(problem):
    kernels, head, rule, wanted, empty = problem
    found = launched(lambda: kernels.backward(Upstream(empty(12), None), head, empty(12), rule, wanted))
    assert sorted(found) == ["_tile_kernel", "mm", "mm", "mm"]
