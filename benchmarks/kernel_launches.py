"""What the Triton launchers ask the compiler for, seen by running them on meta tensors.

A launcher computes grids, strides and options from shapes alone, so it runs on tensors without memory; :func:`recorded`
writes down what it would have launched. :func:`specializations` runs every launcher of every operation in this way over
dtypes, sizes, options and chips, for the tests to compile and for the table of compiled kernels to list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from repdeg_fast.contracts import admin_norm, contrastive, cosreg, gumbel_mix, pairwise
from repdeg_fast.contracts import linear_cross_entropy as lce
from repdeg_fast.ops import admin_norm as admin_norm_ops
from repdeg_fast.ops import cosreg as cosreg_ops
from repdeg_fast.ops import gumbel_mix as gumbel_mix_ops
from repdeg_fast.ops import linear_cross_entropy as lce_ops
from repdeg_fast.ops import pairwise as pairwise_ops

TUNED = "sm_90"  # the chip for which every configuration is compiled, not only the one that ships
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Specialization:
    """One compile-time variant of a kernel.

    ``types`` maps each run-time argument to its Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), ``constants`` each
    compile-time one to its value; ``divisible`` names the arguments that are multiples of 16.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3
    label: str = field(default="", compare=False)
    targets: tuple[str, ...] = ()  # the chips it is for; none named: all


@dataclass(frozen=True)
class Launch:
    """A call of a launcher: ``run`` on meta tensors, for these chips."""

    label: str
    run: Callable[[], object]
    chips: tuple[str, ...] = ("",)


def specializations() -> Iterator[Specialization]:
    """Every one, once."""
    seen: list[Specialization] = []
    for launch in launches():
        for chip in launch.chips:
            for specialization in _of(launch, chip):
                for_all = replace(specialization, targets=())
                if specialization not in seen and for_all not in seen:  # labels do not count
                    seen.append(specialization)
                    yield specialization


def _of(launch: Launch, chip: str) -> Iterator[Specialization]:
    """With the configurations that ship, and for the tuned chip also with the others, one after the other."""
    from repdeg_fast.triton_kernels import tuning

    index, most = 0, 1
    asked: dict[str, Any] = {}

    def answer(question: str, configurations: Sequence[Any]) -> Any:
        nonlocal most
        most = max(most, len(configurations))
        asked[question] = configurations[min(index, len(configurations) - 1)]
        return asked[question]

    while index < (most if chip in ("", TUNED) else 1):
        asked.clear()
        with tuning.compiling_for(chip or TUNED), tuning.answering(answer), recorded() as found:
            launch.run()
        chosen = {str(asdict(configuration)): configuration for configuration in asked.values()}.values()
        sizes = " ".join(f"{name}={value}" for one in chosen for name, value in asdict(one).items())
        label = launch.label if index == 0 else f"{launch.label} {sizes}"
        targets = (TUNED,) if index else (chip,) if chip else ()
        yield from (replace(specialization, label=label, targets=targets) for specialization in found)
        index += 1


@contextmanager
def recorded() -> Iterator[list[Specialization]]:
    """Kernels are not launched inside a ``with`` block, but what would be is listed. Not in the interpreter."""
    from triton.runtime.jit import JITFunction

    found: list[Specialization] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_specialization(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield found


def _specialization(kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Specialization:
    """Triton's own rules: None and 1 are constants, multiples of 16 are known to be; rows of a real tensor that the
    allocator made start on one."""
    limits = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter, value in zip(kernel.params, kernel.signature.bind(*arguments, **options).args, strict=True):
        name = parameter.name
        if parameter.do_not_specialize:
            types[name] = "i32"
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = "*" + _TYPES[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return Specialization(kernel, types, constants, tuple(divisible), **limits)


def launches() -> Iterator[Launch]:
    """Calls of every launcher."""
    yield from _admin_norm()
    yield from _contrastive()
    yield from _cosreg()
    yield from _gumbel_mix()
    yield from _linear_cross_entropy()
    yield from _pairwise()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return _TYPES[dtype]


def _contrastive() -> Iterator[Launch]:
    """Cosines and nothing else, as most ask for; everything at once; the first of two looks at several directions."""
    n, w = 4096, 32_768

    def indices(length: int) -> Tensor:
        return _empty(length, dtype=torch.int64)

    def rows(block: contrastive.ScoreBlock, rule: contrastive.BlockRule) -> None:
        from repdeg_fast.triton_kernels import contrastive as launchers

        launchers.rows(block, rule)

    for dtype in (torch.bfloat16, torch.float32):
        plain = contrastive.ScoreBlock(
            _empty(n, w, dtype=dtype), _empty(n), _empty(n), _empty(n), _empty(w), indices(n), None, None, None, None,
            _empty(n),
        )  # fmt: skip
        rule = contrastive.BlockRule(20.0, 20.0, 1.0, 1.0, 0, False, True)
        ids = contrastive.Ids(indices(n), indices(w))
        full = plain._replace(own=indices(n), threshold=_empty(n), query_ids=ids, document_ids=ids)
        hard = rule._replace(own_factor=0.5, positive_factor=0.5, period=w // 2)
        yield Launch(f"{_name(dtype)} cosine", partial(rows, plain, rule))
        if dtype == torch.bfloat16:
            yield Launch("bf16 everything", partial(rows, full, hard))
            dots = full._replace(row_scale=None, column_scale=None, grad_loss=None)
            yield Launch("bf16 everything, dot, first look", partial(rows, dots, hard._replace(own_factor=0.0)))


def _cosreg() -> Iterator[Launch]:
    kernels = cosreg_ops.operation.triton()
    sizes = [(torch.bfloat16, d) for d in (64, 768, 2304, 8192, 16384)] + [(torch.float32, 768), (torch.float16, 768)]
    for dtype, d in sizes:
        n, weighted, accumulate = 30_522, d == 768, d != 2304
        rows = cosreg.Rows(_empty(n, d, dtype=dtype), _empty(n) if weighted else None, 1e-12)
        saved = cosreg.Saved(_empty(d), _empty(n), _empty() if weighted else None)
        label = f"{_name(dtype)} d={d}"
        yield Launch(label, partial(kernels.forward, rows))
        backward = partial(kernels.backward, rows.weight, _empty(), rows, saved, accumulate=accumulate)
        yield Launch(label + " accumulate" * accumulate, backward)


def _admin_norm() -> Iterator[Launch]:
    """All options, or LayerNorm's own two parameters alone; rows held whole, and longer ones."""
    kernels = admin_norm_ops.operation.triton()
    sizes = [(torch.bfloat16, d) for d in (768, 4096, 8192, 65536)] + [(torch.float32, 4096), (torch.float16, 64)]
    for dtype, d in sizes:
        for everything in (False, True):
            x, parameter, n = _empty(4099, d, dtype=dtype), _empty(d), 4099
            option = parameter if everything else None
            seed = _empty(1, dtype=torch.int64) if everything else None
            dropout = admin_norm.Dropout(seed, 0.1 if everything else 0.0)
            label = f"{_name(dtype)} d={d}" + " everything" * everything
            residual, affine = admin_norm.Residual(x, x, option, option), admin_norm.Affine(parameter, parameter)
            yield Launch(label, partial(kernels.forward, residual, affine, dropout, admin_norm.Norm(1e-5, True)))
            wanted = admin_norm.Wanted(True, everything, True, True, everything)
            rstd = _empty(n)
            output = admin_norm.Saved(
                x, x if everything else None, None, option, parameter, parameter, None, None, rstd
            )
            inputs = admin_norm.Saved(None, x, x, option, parameter, None, option, rstd, rstd)
            for origin, saved in (("output", output), ("input", inputs)):
                backward = partial(kernels.backward, wanted, x, saved, dropout, center=True)
                yield Launch(f"{label} from {origin}", backward)


def _linear_cross_entropy() -> Iterator[Launch]:
    """Plain, and with all options; an fp32 weight beside 16-bit rows; rows that stay in registers, and longer ones."""
    kernels = lce_ops.operation.triton()
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    dtypes = [(bf16, bf16), (fp16, fp16), (bf16, fp32), (fp32, fp32)]
    for (dtype, weight_dtype), vocabulary in [((bf16, bf16), 250_002), *((one, 30_522) for one in dtypes)]:
        for everything in (False, True):
            label = f"{_name(dtype)} " + f"{_name(weight_dtype)} weight " * (dtype != weight_dtype)
            label += f"V={vocabulary}" + " everything" * everything
            yield from _linear_cross_entropy_passes(kernels, label, dtype, weight_dtype, vocabulary, everything)


def _linear_cross_entropy_passes(
    kernels: lce.Kernels, label: str, dtype: torch.dtype, weight_dtype: torch.dtype, vocabulary: int, everything: bool
) -> Iterator[Launch]:
    heads, positions, d = 3, 4099, 768
    n = heads * positions
    hidden_states, weight = _empty(n, d, dtype=dtype), _empty(vocabulary, d, dtype=weight_dtype)
    bias = _empty(vocabulary, dtype=weight_dtype) if everything else None
    head = lce.Head(hidden_states, weight, _empty(positions, dtype=torch.int64), bias)
    rule = lce.LossRule(-100, 0.1, 30.0, lce.ClassWeight(_empty(vocabulary), _empty()), 1e-3)
    rule = rule if everything else lce.LossRule(-100, 0.0, 0.0)
    wanted = lce.Wanted(True, True, everything, torch.float32)
    grad_loss, grad_heads, share = _empty(n), _empty(heads), _empty()
    made = lce.Gradients(hidden_states, weight, bias)
    upstream = lce.Upstream(grad_loss, grad_loss if everything else None)
    known = lce.Upstream(share.expand(n), *(grad_loss, share.expand(n)) * everything)
    predicted = _empty(n, dtype=torch.int64) if everything else None
    if vocabulary == 30_522:
        yield Launch(label, partial(kernels.forward, head, rule, predicted), CHIPS)
        rows = lce.Upstream(grad_loss, None, grad_loss if everything else None)
        rescale = partial(kernels.rescale_, made, grad_heads, lambda: rows, head, rule, wanted)
        yield Launch(label + " rescale", rescale, CHIPS)
        yield Launch(label + " streaming", partial(kernels.backward, upstream, head, grad_loss, rule, wanted), CHIPS)
        yield Launch(label, partial(kernels.share, head, rule, True), CHIPS)
        yield Launch(label, partial(kernels.total, grad_loss, heads, share), CHIPS)
    chunked = partial(kernels.forward_backward, known, head, rule, wanted, None, predicted)
    yield Launch(label + " chunked", chunked, CHIPS)


def _gumbel_mix() -> Iterator[Launch]:
    """Passes over a whole chunk of the vocabulary and over a last one, that ends anywhere: hard ones of heads that are
    mixed, soft ones of a single head; and samples from the losses' logits."""
    kernels = gumbel_mix_ops.operation.triton()
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    sizes = ((bf16, False, 3072), (bf16, True, 3072), (bf16, True, 2874), (fp32, True, 2874), (fp16, False, 3072))
    for dtype, bias, v in sizes:
        m, d = 4915, 768
        mixed = gumbel_mix.Heads(_empty(3, m, d, dtype=dtype), _empty(m, 3, dtype=dtype))
        one = gumbel_mix.Heads(mixed.hidden_states[:1], None)
        weight = _empty(v, d, dtype=dtype)
        projection = gumbel_mix.Projection(weight, _empty(v) if bias else None)
        noise = gumbel_mix.Noise(_empty(1, dtype=torch.int64), 0.3)
        drawn = gumbel_mix.Drawn(_empty(m, dtype=torch.int64), _empty(m))
        label = f"{_name(dtype)} V={v}" + " bias" * bias
        for hard, heads in ((True, mixed), (False, one)):
            name = f"{label} {'hard' if hard else 'soft'}"
            yield Launch(name, partial(kernels.forward, heads, projection, weight, noise, hard=hard))
            estimator, wanted = gumbel_mix.Estimator(hard, -1.0), gumbel_mix.Wanted(hard, True)
            arguments = (_empty(m, d, dtype=dtype), heads, projection, weight, drawn, noise, estimator, wanted)
            yield Launch(name, partial(kernels.backward, *arguments))
        if v % 16:
            logits = _empty(3, m, 2880, dtype=dtype)[:, :, :v]
            block = gumbel_mix.HeadLogits(logits, mixed.mixture_logits, projection.bias, 0)
            yield Launch(f"{label} logits", partial(kernels.sample_logits, drawn, block, noise))
        if bias:
            yield from _gumbel_candidates(kernels, dtype, v)


def _gumbel_candidates(kernels: gumbel_mix.Kernels, dtype: torch.dtype, v: int) -> Iterator[Launch]:
    """A temperature at which few tokens matter."""
    m, d = 4915, 768
    noise = gumbel_mix.Noise(_empty(1, dtype=torch.int64), 0.1)
    drawn = gumbel_mix.Drawn(_empty(m, dtype=torch.int64), _empty(m))
    heads = gumbel_mix.Heads(_empty(3, m, d, dtype=dtype), _empty(m, 3, dtype=dtype))
    weight, bias = _empty(v, d, dtype=dtype), _empty(v)
    kept = _empty(m, kernels.room(dtype, noise.temperature), dtype=torch.int32)
    logits = _empty(3, m, -(-v // 16) * 16, dtype=dtype)[:, :, :v]
    block = gumbel_mix.HeadLogits(logits, heads.mixture_logits, bias, 0)
    label = f"{_name(dtype)} V={v} bias"
    yield Launch(f"{label} logits", partial(kernels.sample_logits, drawn, block, noise, kept))
    arguments = (_empty(m, d, dtype=dtype), heads, gumbel_mix.Projection(weight, bias), weight, drawn, noise)
    estimator, wanted = gumbel_mix.Estimator(True, -1.0), gumbel_mix.Wanted(True, False)
    yield Launch(f"{label} candidates", partial(kernels.backward, *arguments, estimator, wanted, kept))


def _pairwise() -> Iterator[Launch]:
    """Every φ with slopes; the longest of them also without, and in rows without padding."""
    kernels = pairwise_ops.operation.triton()
    exp, whole, lower = pairwise.Kind.EXP, pairwise.LeftOut.NOTHING, pairwise.LeftOut.LOWER
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(bf16, 8192, kind, lower) for kind in pairwise.Kind] + [(fp32, 4099, exp, lower), (bf16, 8192, exp, whole)]
    for dtype, columns, kind, left_out in cases:
        block = pairwise.Block(_empty(512, columns, dtype=dtype), _empty(512), _empty(columns), 512, left_out)
        rule, label = pairwise.Rule(kind, 0.25, _empty()), f"{_name(dtype)} W={columns} {kind.name.lower()}"
        slopes = left_out == lower
        yield Launch(label + " slopes" * slopes, partial(kernels.measure, block, rule, _empty(512), slopes=slopes))
        if kind == exp and slopes:
            other = block._replace(left_out=pairwise.LeftOut.OWN)
            index = _empty(512, dtype=torch.int64)
            yield Launch(f"{_name(dtype)} W={columns}", partial(kernels.maxima, other, _empty(512), index))
