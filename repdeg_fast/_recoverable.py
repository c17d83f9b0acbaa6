"""Whether a normalized value n can be taken back from the output y = n ⊙ γ + β, known without stalling a GPU.

Rounding y moves (y − β)/γ by up to u·|y|/|γ|, u the unit roundoff of y: by u·|n| where β is small, by u·|β/γ| where it
is not. So what counts is the smallest |γ| / max(|β|, 2⁻⁸) over the columns, the floor keeping fp16 away from subnormal
numbers. :data:`SMALLEST_RATIO` is where the error of n reaches the tolerances of docs/design.md, were all so bad.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SMALLEST_RATIO = {
    torch.bfloat16: 2.0**-2,
    torch.float16: 2.0**-5,
    torch.float32: 2.0**-8,
    torch.float64: 2.0**-8,
}
_FLOOR = 2.0**-8
_GPU_INTERVAL = 16  # updates of the parameters between two looks: each is several small kernels, and γ moves slowly


def smallest_ratio(weight: Tensor | None, bias: Tensor | None) -> float | None:
    """The smallest |γ| / max(|β|, 2⁻⁸) over the columns; γ = 1 and β = 0 where absent. ``None``: nobody knows, for the
    first look of all would wait for the stream, and that is being captured; or a function transform has the parameter.

    As last seen. Another look is taken when the parameters have changed, as their version counters tell, which writes
    through ``.data`` do not move; on a GPU every few changes, copied to the host on the side and used once it is there
    (the first look of all waits for the stream). The answer changes with a parameter only, so that a checkpointed
    forward pass that runs again saves the same tensors.
    """
    measured = bias if weight is None else weight
    last = measured if bias is None else bias
    if measured is None or last is None:
        return 1 / _FLOOR
    look = _looks.get(id(measured))
    known = look is not None and look.measured() is measured and look.last() is last
    if not known and torch._C._are_functorch_transforms_active():  # which wrap a parameter's values
        return None
    if not known and (measured.is_meta or isinstance(measured, FakeTensor)):  # no values to look at
        return 1 / _FLOOR
    place = measured.data_ptr(), last.data_ptr()
    version = measured._version + last._version
    if look is None or not known or look.place != place:
        if measured.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        ratio = _ratio(weight, bias).item()
        forget = partial(_looks.pop, id(measured))  # called with the dead reference, as the default
        look = _Look(weakref.ref(measured, forget), weakref.ref(last), place, version, version, ratio)
        _looks[id(measured)] = look
    elif version != look.version:
        look.update(version, weight, bias)
    return look.ratio


@dataclass
class _Look:
    measured: Callable[[], Tensor | None]  # still this weight, and not another at its address
    last: Callable[[], Tensor | None]  # the bias, if there is one: a weight may meet several
    place: tuple[int, int]  # in memory, which an assignment to `.data` changes
    version: int  # of the parameters when `ratio` was last asked for
    begun: int  # their version when it was last measured
    ratio: float
    arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def update(self, version: int, weight: Tensor | None, bias: Tensor | None) -> None:
        measured = self.measured()
        assert measured is not None
        if measured.device.type != "cuda":
            self.version, self.ratio = version, _ratio(weight, bias).item()
        elif not torch.cuda.is_current_stream_capturing():
            self.version = version
            self._update_on_the_side(weight, bias)

    def _update_on_the_side(self, weight: Tensor | None, bias: Tensor | None) -> None:
        if self.arriving is not None and self.arriving[1].query():
            self.ratio, self.arriving = self.arriving[0].item(), None
        if self.arriving is None and self.version - self.begun >= _GPU_INTERVAL:
            ratio = _ratio(weight, bias)
            on_host = torch.empty((), pin_memory=True).copy_(ratio, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(ratio.device))  # which need not be the current device
            self.begun, self.arriving = self.version, (on_host, arrived)


_looks: dict[int, _Look] = {}  # by id, as long as the parameter lives


@torch.no_grad()
def _ratio(weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = 1.0 if weight is None else weight.float().abs()
    floor = _FLOOR if bias is None else bias.float().abs().clamp_min(_FLOOR)
    return torch.as_tensor(scale / floor).min()
