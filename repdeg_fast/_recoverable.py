"""Whether a normalized value n can be taken back from the output y = n ⊙ γ + β, known without stalling a GPU.

Rounding y moves (y − β)/γ by up to u·|y|/|γ|, u the unit roundoff of y: by u·|n| where β is small, by u·|β/γ| where it
is not. So what counts is the smallest |γ| / max(|β|, 2⁻⁸) over the columns, the floor keeping fp16 away from subnormal
numbers. :data:`SMALLEST_RATIO` is where the error of n reaches the tolerances of DESIGN §6, were every column that bad.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

SMALLEST_RATIO = {
    torch.bfloat16: 2.0**-2,
    torch.float16: 2.0**-5,
    torch.float32: 2.0**-8,
    torch.float64: 2.0**-8,
}
_FLOOR = 2.0**-8
_GPU_INTERVAL = 16  # updates of the parameters between two looks: each is several small kernels, and γ moves slowly


def smallest_ratio(weight: Tensor | None, bias: Tensor | None) -> float:
    """The smallest |γ| / max(|β|, 2⁻⁸) over the columns; γ = 1 and β = 0 where absent.

    On a GPU as last seen: the first look waits for the stream; later ones, every few updates of the parameters (as
    their version counters tell them, which writes through ``.data`` do not move), are copied to the host on the side
    and used once they are there. The answer changes with an update only, so that a checkpointed forward pass that runs
    again saves the same tensors.
    """
    watched = weight if weight is not None else bias
    if watched is None or watched.is_meta or isinstance(watched, FakeTensor):  # no values to look at: the usual case
        return 1 / _FLOOR
    if watched.device.type != "cuda":
        return _ratio(weight, bias).item()
    version = sum(p._version for p in (weight, bias) if p is not None)
    look = _looks.get(watched)
    if look is None:
        look = _looks[watched] = _Look(version, version, _ratio(weight, bias).item())
    elif version != look.version and not torch.cuda.is_current_stream_capturing():
        look.update(version, weight, bias)
    return look.ratio


@dataclass
class _Look:
    version: int  # of the parameters when `ratio` was last asked for
    begun: int  # their version when it was last measured
    ratio: float
    arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def update(self, version: int, weight: Tensor | None, bias: Tensor | None) -> None:
        self.version = version
        if self.arriving is not None and self.arriving[1].query():
            self.ratio, self.arriving = self.arriving[0].item(), None
        if self.arriving is None and version - self.begun >= _GPU_INTERVAL:
            on_host = torch.empty((), pin_memory=True).copy_(_ratio(weight, bias), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self.begun, self.arriving = version, (on_host, arrived)


_looks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.no_grad()
def _ratio(weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = 1.0 if weight is None else weight.float().abs()
    floor = _FLOOR if bias is None else bias.float().abs().clamp_min(_FLOOR)
    return torch.as_tensor(scale / floor).min()
