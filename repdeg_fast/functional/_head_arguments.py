"""The arguments of the functions that score rows against a vocabulary: checked, and as their operators take them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from repdeg_fast import backends
from repdeg_fast._arithmetic import autocast_dtype
from repdeg_fast._checks import check_dense, check_finite, check_floating, check_integer, check_positive, row_of_padding
from repdeg_fast.contracts.linear_cross_entropy import Head
from repdeg_fast.ops import linear_cross_entropy as _ops
from repdeg_fast.ops._operator import wants_gradient
from repdeg_fast.ops.buffers import limit

REDUCTIONS = ("none", "sum", "mean")
FP32 = torch.finfo(torch.float32)
STRATEGIES = ("auto", "chunked", "streaming")


class Options(NamedTuple):
    """As users give them, and after :func:`check_options` and :func:`check_tensors` as operators take them."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None  # then 0 for none
    reduction: str
    strategy: str
    accumulate_dtype: torch.dtype
    padding_idx: int | None  # then counted from the front
    class_weight: Tensor | None = None
    lse_square_scale: float = 0.0
    gradient_filter: float | None = None


def arguments(
    head: Head, heads: int, options: Options, *, upstream_known: bool = True, samples: bool = False,
    predict: bool = False,
) -> Any:  # fmt: skip
    """What operators take behind a head: class weights, rule, heads, reduction, which gradients to make, whether to
    predict, whether in chunks, backend.

    A sample is drawn in the same way whether or not gradients are needed: activation checkpointing draws it twice.
    """
    hidden_states, weight, _, bias = head
    needs = [wants_gradient(tensor) for tensor in (hidden_states, weight, bias)]
    (
        ignore_index, label_smoothing, softcap, reduction, strategy, accumulate_dtype, padding_idx, class_weight,
        lse_square_scale, gradient_filter,
    ) = options  # fmt: skip
    chunked = strategy != "streaming" and reduction != "none" and (samples or True in needs)
    if chunked and strategy == "auto":
        (rows, width), device = hidden_states.shape, weight.device
        strategy = _ops.choose_strategy(
            rows, weight.shape[0], width, hidden_states.dtype, upstream_known=upstream_known,
            buffer_bytes=limit(weight), memory=_memory(device),
        )  # fmt: skip
        chunked = strategy == "chunked"
    rule = (class_weight, ignore_index, label_smoothing, softcap, gradient_filter or 0.0)
    reduced = (heads, lse_square_scale, reduction, padding_idx, accumulate_dtype)
    return *rule, *reduced, needs, predict, chunked, backends.requested()


def check_options(options: Options) -> Options:
    """All but what concerns tensors."""
    (
        ignore_index, label_smoothing, softcap, reduction, strategy, accumulate_dtype, padding_idx, class_weight,
        lse_square_scale, gradient_filter,
    ) = options  # fmt: skip
    if not (type(label_smoothing) is float and 0 <= label_smoothing <= 1):
        check_finite("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if softcap is not None:
        check_positive("softcap", softcap)
        if not FP32.tiny <= softcap <= FP32.max:
            raise ValueError(f"softcap: expected a number that float32 holds, got {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    return Options(
        ignore_index, float(label_smoothing), float(softcap or 0), reduction, strategy, accumulate_dtype, padding_idx,
        class_weight, _scale(lse_square_scale), _filter(gradient_filter),
    )  # fmt: skip


def _scale(lse_square_scale: float) -> float:
    if lse_square_scale == 0:
        return 0.0
    check_finite("lse_square_scale", lse_square_scale)
    if not 0 < lse_square_scale <= FP32.max:
        raise ValueError(f"lse_square_scale: expected a number from 0 on that float32 holds, got {lse_square_scale}")
    return float(lse_square_scale)


def _filter(gradient_filter: float | None) -> float | None:
    if gradient_filter is None:
        return None
    check_finite("gradient_filter", gradient_filter)
    if not 0 <= gradient_filter < 1:
        raise ValueError(f"gradient_filter: expected None or a probability in [0, 1), got {gradient_filter}")
    return float(gradient_filter)


def check_class_weight(class_weight: Tensor, vocabulary: int, device: torch.device) -> None:
    check_floating("class_weight", class_weight)
    if class_weight.shape != (vocabulary,):
        given = tuple(class_weight.shape)
        raise ValueError(f"class_weight: expected shape ({vocabulary},), one value a class, got {given}")
    if class_weight.requires_grad:
        raise ValueError("class_weight: expected a tensor that needs no gradient, got one that does; detach() it")
    if class_weight.device != device:
        _raise_device(device, class_weight=class_weight)


def check_target(target: Tensor, ignore_index: int) -> None:
    """Class indices, and an integer that can be compared with them."""
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        given = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected a tensor of class indices, int64 or int32, got {given}")
    check_dense("target", target)
    if type(ignore_index) is int and -(2**31) <= ignore_index < 2**31:
        return
    check_integer("ignore_index", ignore_index)
    limits = torch.iinfo(target.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"ignore_index: expected an integer that {target.dtype} like target holds, got {ignore_index}")


def check_heads(shape: torch.Size, target: Tensor) -> None:
    """``shape`` of hidden states is (K, M, d), that of ``target`` (M,)."""
    if len(shape) != 3 or shape[0] == 0:
        raise ValueError(f"hidden_states: expected 3 dimensions (K, M, d), K at least 1, got shape {tuple(shape)}")
    if target.shape != shape[1:2]:
        raise ValueError(
            f"target: expected shape ({shape[1]},), one for each of the M positions of hidden_states, "
            f"got {tuple(target.shape)}"
        )


def check_tensors(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Options]:
    """Check all that concerns one or two arguments; returns hidden_states in the dtype that is multiplied."""
    check_floating("hidden_states", hidden_states)
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected 2 dimensions (V, d), neither of them 0, got shape {tuple(weight.shape)}")
    (vocabulary, width), device = weight.shape, hidden_states.device
    if hidden_states.dim() < 1 or hidden_states.shape[-1] != width:
        raise ValueError(
            f"hidden_states: expected a last dimension of {width} like weight {tuple(weight.shape)}, "
            f"got shape {tuple(hidden_states.shape)}"
        )
    check_target(target, options.ignore_index)
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != (vocabulary,):
            raise ValueError(
                f"bias: expected shape ({vocabulary},), one value a row of weight, got {tuple(bias.shape)}"
            )
    if options.class_weight is not None:
        check_class_weight(options.class_weight, vocabulary, device)
    if not (weight.device == device == target.device and (bias is None or bias.device == device)):
        _raise_device(device, weight=weight, target=target, bias=bias)
    hidden_states = _operand(hidden_states, weight, bias)
    accumulate_dtype, padding_idx = options.accumulate_dtype, options.padding_idx
    if accumulate_dtype is not torch.float32 and accumulate_dtype is not weight.dtype:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys((torch.float32, weight.dtype)))
        raise ValueError(f"accumulate_dtype: expected {expected}, got {accumulate_dtype!r}")
    if padding_idx is not None:
        options = options._replace(padding_idx=row_of_padding(padding_idx, vocabulary))
    return hidden_states, options


def _raise_device(device: torch.device, **others: Tensor | None) -> NoReturn:
    name, given = next((n, t.device) for n, t in others.items() if t is not None and t.device != device)
    raise ValueError(f"{name}: expected device {device} like hidden_states, got {given}")


def _operand(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The hidden states in the dtype that is multiplied: autocast's where it is on, as for ``F.linear``."""
    autocast = autocast_dtype(hidden_states.device)
    if autocast is not None and torch.float64 not in (hidden_states.dtype, weight.dtype):
        return hidden_states.to(autocast)
    dtype = hidden_states.dtype
    if weight.dtype is dtype and (bias is None or bias.dtype is dtype):
        return hidden_states
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden_states.dtype:
            raise TypeError(
                f"{name}: expected {hidden_states.dtype} like hidden_states, got {tensor.dtype}; convert one of them "
                f"or use torch.autocast"
            )
    return hidden_states


def stacked(hidden_states: Tensor | Sequence[Tensor]) -> Tensor:
    """K heads' hidden states in one tensor."""
    if isinstance(hidden_states, Tensor):
        return hidden_states
    if not isinstance(hidden_states, Iterable):
        given = type(hidden_states).__name__
        raise TypeError(f"hidden_states: expected a tensor (K, M, d) or a sequence of K tensors (M, d), got {given}")
    layers = list(hidden_states)
    if not layers:
        raise ValueError("hidden_states: expected at least one tensor, got an empty sequence")
    for i, layer in enumerate(layers):
        check_floating(f"hidden_states[{i}]", layer)
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"hidden_states[{i}]: expected shape {tuple(layers[0].shape)} like hidden_states[0], "
                f"got {tuple(layer.shape)}"
            )
        if layer.dtype != layers[0].dtype:
            raise TypeError(f"hidden_states[{i}]: expected {layers[0].dtype} like hidden_states[0], got {layer.dtype}")
        if layer.device != layers[0].device:
            expected = f"device {layers[0].device} like hidden_states[0]"
            raise ValueError(f"hidden_states[{i}]: expected {expected}, got {layer.device}")
    return torch.stack(layers)


def _memory(device: torch.device) -> int | None:
    """Bytes of the device that ``strategy="auto"`` reckons with; ``None`` where that is not known, or not asked for: a
    graph that is compiled here may run elsewhere."""
    return None if torch.compiler.is_compiling() else _total_memory(device)


@functools.cache
def _total_memory(device: torch.device) -> int | None:
    """Asked for once: a call asks neither the system nor the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not POSIX
        return None


def shifted(target: Tensor, shift: bool | int, ignore_index: int) -> Tensor:
    """What each position predicts: nothing, at the end of a sequence."""
    check_integer("shift", int(shift) if isinstance(shift, bool) else shift)
    if shift < 0 or target.dim() == 0:
        raise ValueError(
            f"shift: expected a number of positions from 0 on, of hidden_states (..., T, d), got {shift} of "
            f"{tuple(target.shape)}"
        )
    steps = min(int(shift), target.shape[-1])
    return F.pad(target[..., steps:], (0, steps), value=ignore_index)
