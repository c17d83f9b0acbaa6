"""Launch configurations, and the list of specializations that are compiled ahead of time in the tests.

Each launcher lists the configurations of its kernel, the one that ships first, and takes the one that :func:`choose`
names: the first, or what tuning on this GPU found to be faster (``repdeg-fast tune``) and wrote to the file that
:func:`load` read. A configuration changes results by rounding at most.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

PADDING = 16  # values
_META_MULTIPROCESSORS = 132  # an H200's, where a launcher runs on meta tensors

Configuration = TypeVar("Configuration")  # a dataclass of integers
Answer = Callable[[str, Sequence[Any]], Any]  # (question, configurations) -> one of them


@dataclass(frozen=True)
class Specialization:
    """One compile-time variant of a kernel, as a launcher would ask for it.

    ``types`` maps each run-time argument to its Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), ``constants`` each
    compile-time one to its value. Pointers and the arguments named in ``divisible`` are taken to be multiples of 16,
    as the launcher finds them for rows of a multiple of 16 values.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    label: str = field(default="", compare=False)
    targets: tuple[str, ...] = ()  # the chips it is for; none named: all


def variants(
    configurations: Sequence[Configuration], make: Callable[[Configuration], Specialization]
) -> Iterator[Specialization]:
    """What to compile ahead of time: the configuration that ships, and for the chip that is tuned the others."""
    shipped = make(configurations[0])
    yield shipped
    seen = [shipped]
    for configuration in configurations[1:]:
        one = make(configuration)
        values = " ".join(f"{name}={value}" for name, value in asdict(configuration).items())  # type: ignore[call-overload]
        if one not in seen:  # labels do not count, nor does the number of programs
            seen.append(one)
            yield replace(one, label=f"{one.label} {values}", targets=("sm_90",))


def choose(kernel: str, configurations: Sequence[Configuration], like: Tensor, **sizes: int) -> Configuration:
    """The configuration to launch ``kernel`` with on the device and dtype of ``like``. Tuned ones are kept by sizes
    rounded up to powers of two."""
    if _answer is None and not _tuned:
        return configurations[0]
    rounded = (f"{name}<={1 << max(size - 1, 0).bit_length()}" for name, size in sizes.items())
    question = " ".join((kernel, str(like.dtype).removeprefix("torch."), *rounded))
    if _answer is not None:
        return _answer(question, configurations)
    tuned = _tuned.get(device_name(like.device), {}).get(question)
    # one that is listed no more is as good as none
    return next((c for c in configurations if asdict(c) == tuned), configurations[0])  # type: ignore[call-overload]


def chip(device: torch.device) -> str:
    """Whose kernels are asked for: "sm_80" stands for all NVIDIA chips that are not named."""
    if device.type == "meta":
        return _compiling_for
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """What :func:`chip` says of meta tensors inside a ``with`` block."""
    global _compiling_for
    before, _compiling_for = _compiling_for, target
    try:
        yield
    finally:
        _compiling_for = before


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Let ``answer`` choose inside a ``with`` block: how tuning learns what is asked, and tries configurations."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def load(path: Path) -> None:
    """Choose by what was found before; a file that is not there or cannot be read is as good as an empty one."""
    global _tuned
    _tuned = _read(path)


def remember(path: Path, device: str, question: str, configuration: Any) -> None:
    """Add what was found to the file. Replaced as a whole, so that a killed run leaves none half-written."""
    table = _read(path)
    table.setdefault(device, {})[question] = asdict(configuration)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(draft, path)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict) or not all(isinstance(found, dict) for found in table.values()):
            raise ValueError("not a table of devices")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        message = f"repdeg_fast: tuned configurations are ignored, {path} cannot be read ({error}); delete it"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return {}
    return table


_answer: Answer | None = None
_compiling_for = "sm_90"
_tuned: dict[str, dict[str, Any]] = {}


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class RowTile:
    """How a kernel that holds whole rows in registers cuts its work: ``rows`` × ``columns`` values a step, by
    ``programs`` a multiprocessor."""

    rows: int
    columns: int
    num_warps: int
    programs: int


def row_tile(d: int, values: int, programs: int) -> RowTile:
    """About ``values`` values a step, 32 a thread at 4096: enough independent 16-byte loads in flight, and room for as
    many accumulators without spilling. Longer rows get more warps instead of more values a thread."""
    columns = triton.next_power_of_2(d)
    return RowTile(max(1, values // columns), columns, max(4, columns // 1024), programs)


def padded_columns(matrix: Tensor) -> int:
    """The columns of ``matrix``, with the padding behind them where rows have it: a mask that ends on a multiple of
    PADDING is one mask for 16 bytes, which are then moved at once. A matrix without padding goes value by value."""
    columns = matrix.shape[-1]
    padded = triton.cdiv(columns, PADDING) * PADDING
    return padded if padded <= matrix.stride(-2) else columns


def padded_vector(vector: Tensor | None, columns: int) -> Tensor | None:
    """``vector`` in ``columns`` values, zeros at its end, for kernels that read it beside a padded matrix."""
    if vector is None or len(vector) == columns:
        return vector
    return torch.nn.functional.pad(vector, (0, columns - len(vector)))


def persistent_programs(tensor: torch.Tensor, per_multiprocessor: int) -> int:
    """Programs of a persistent grid on the tensor's device. On a CPU (the interpreter) a small odd number."""
    if tensor.device.type == "meta":
        return _META_MULTIPROCESSORS * per_multiprocessor
    if tensor.device.type != "cuda":
        return 3
    return _multiprocessors(tensor.device) * per_multiprocessor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
