"""Hidden states by layer, streamed from a model: Hugging Face, sentence-transformers, nn.Transformer, or any with
hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_STACKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class HiddenStates:
    """Representations of n tokens in their sentences, on the CPU in float32."""

    layers: tuple[str, ...]
    states: tuple[Tensor, ...]  # (n, d) a layer
    tokens: Tensor  # (n,) ids
    positions: Tensor  # (n,) in the sentence, padding not counted
    sentences: Tensor  # (n,) counted over all batches

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, chosen: Tensor) -> HiddenStates:
        """Of some of the tokens; a mask or indices."""
        rows = (self.tokens[chosen], self.positions[chosen], self.sentences[chosen])
        return HiddenStates(self.layers, tuple(state[chosen] for state in self.states), *rows)

    def layer(self, name: str) -> Tensor:
        """(n, d)"""
        if name not in self.layers:
            raise ValueError(f"layer: no {name!r}; there are {', '.join(self.layers)}")
        return self.states[self.layers.index(name)]


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    tokens: Sequence[int] | Tensor | None = None,
    per_token: int | None = None,
    *,
    positions: Sequence[int] | Tensor | None = None,
    limit: int | None = None,
    layers: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    progress: bool = False,
) -> HiddenStates:
    """Hidden states of chosen tokens; memory is that of what is chosen and of one batch.

    Args:
        model: A Hugging Face model (its ``hidden_states``), a SentenceTransformer (those of its encoder), a model with
            nn.TransformerEncoder or -DecoderLayers (their outputs, and the input of the first), or any module with
            ``layers``.
        batches: What the model is called with: dicts (as keywords; ``input_ids`` and ``attention_mask``), tensors of
        ids
            (B, L), tuples that start with such, or lists of texts for a SentenceTransformer.
        tokens: Ids to keep; default all.
        per_token: Occurrences kept of each, the first ones; default all.
        positions: In the sentence, to keep; default all.
        limit: Tokens kept at most; reading ends there.
        layers: Names of modules whose outputs are looked at in place of the above.
        pad_token_id: Left out where there is no ``attention_mask``.
        progress: Shows a bar.

    Raises:
        ValueError: no tokens, none of those asked for, NaN in a layer, an unknown layer, or one that did not run.
        TypeError: a model without layers that are known.
    """
    wanted = None if tokens is None else torch.as_tensor(tokens)
    places = None if positions is None else torch.as_tensor(positions)
    kept: list[HiddenStates] = []
    seen, count, read = torch.zeros(0, dtype=torch.long), 0, 0
    for batch in stream(model, batches, layers=layers, pad_token_id=pad_token_id, progress=progress):
        read += len(batch)
        if wanted is not None:
            batch = batch.select(torch.isin(batch.tokens, wanted))
        if places is not None:
            batch = batch.select(torch.isin(batch.positions, places))
        if per_token is not None and len(batch):
            chosen, seen = _first_occurrences(batch.tokens, seen, per_token)
            batch = batch.select(chosen)
        if limit is not None:
            batch = batch.select(torch.arange(min(len(batch), limit - count)))
        count += len(batch)
        if len(batch):
            kept.append(batch)
        if count == limit:
            break
    if not read:
        raise ValueError("batches: expected some tokens, got none; is the text empty?")
    if not kept:
        raise ValueError(f"tokens: none of those asked for is among the {read} that were read")
    return concatenated(kept)


def concatenated(parts: Sequence[HiddenStates]) -> HiddenStates:
    states = tuple(torch.cat(layer) for layer in zip(*(part.states for part in parts), strict=True))
    rows = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "positions", "sentences"))
    return HiddenStates(parts[0].layers, states, *rows)


def stream(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    progress: bool = False,
) -> Iterator[HiddenStates]:
    """:func:`collect`'s states a batch at a time, of all tokens but padding; one batch is in memory."""
    sentences = 0
    with reader(model, layers) as read:
        for batch in _tracked(batches) if progress else batches:
            names, states, ids, mask = read(batch)
            if mask is None:
                mask = torch.ones_like(ids) if pad_token_id is None else ids != pad_token_id
            mask = mask.bool()
            for name, state in zip(names, states, strict=True):
                if not torch.isfinite(state[mask]).all():
                    raise ValueError(f"{name}: NaN or Inf in its hidden states")
            rows = torch.arange(sentences, sentences + len(ids))[:, None].expand(ids.shape)
            sentences += len(ids)
            chosen = tuple(state[mask].float().cpu() for state in states)
            positions = mask.long().cumsum(1) - 1
            yield HiddenStates(names, chosen, ids[mask].cpu(), positions[mask].cpu(), rows[mask.cpu()])


Read = Callable[[Any], tuple[tuple[str, ...], list[Tensor], Tensor, "Tensor | None"]]


@contextmanager
def reader(model: nn.Module, layers: Sequence[str] | None = None) -> Iterator[Read]:
    """A function from a batch to names of layers, states (B, L, d) each, ids (B, L) and the attention mask or None.
    The model is in evaluation mode meanwhile, without gradients, and afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    encode = _encode_of(model)
    if encode is not None:
        model = encoder_of(model)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # its nested tensors have no positions
        with ExitStack() as stack, torch.no_grad():
            if layers is None and hasattr(getattr(model, "config", None), "to_dict"):
                run: Callable[[Any], tuple[tuple[str, ...], list[Tensor]]] = _HuggingFace(model)
            else:
                run = _Hooks(model, layers, stack)

            def read(batch: Any) -> tuple[tuple[str, ...], list[Tensor], Tensor, Tensor | None]:
                batch = _moved(encode(batch) if encode else batch, model)
                ids = _ids(batch)
                names, states = run(batch)
                states = [_batch_first(name, state, ids) for name, state in zip(names, states, strict=True)]
                return names, states, ids, batch.get("attention_mask") if isinstance(batch, Mapping) else None

            yield read
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training


class _HuggingFace:
    def __init__(self, model: nn.Module):
        self.model: Any = model
        if getattr(model.config, "is_encoder_decoder", False):
            self.model = model.get_encoder()  # type: ignore[operator]

    def __call__(self, batch: Any) -> tuple[tuple[str, ...], list[Tensor]]:
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": _ids(batch)}
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        states = getattr(self.model(**inputs, output_hidden_states=True, return_dict=True), "hidden_states", None)
        if not states:
            raise TypeError(f"model: {type(self.model).__name__} gave no hidden_states; name modules in layers")
        return ("embeddings", *(f"layer {i}" for i in range(1, len(states)))), list(states)


class _Hooks:
    """The outputs of modules; of all Transformer layers of one stack, and what goes into the first, by default."""

    def __init__(self, model: nn.Module, layers: Sequence[str] | None, stack: ExitStack):
        self.model, self.caught = model, dict[str, Tensor]()
        modules = dict(model.named_modules())
        default = layers is None
        if layers is None:
            layers = [name for name, module in modules.items() if isinstance(module, _STACKS)]
            if encoders := [name for name in layers if isinstance(modules[name], nn.TransformerEncoderLayer)]:
                layers = encoders  # of an nn.Transformer: the decoder's tokens are others
        if not layers:
            raise TypeError(
                f"model: {type(model).__name__} is no Hugging Face model and has no nn.TransformerEncoderLayer;"
                " name modules in layers"
            )
        self.names: tuple[str, ...] = (*(["embeddings"] if default else []), *layers)
        for name in layers:
            if name not in modules:
                raise ValueError(f"layers: no module {name!r}; there are {', '.join(filter(None, modules))}")
            handle = modules[name].register_forward_hook(self._catcher(name, modules[name]))
            stack.callback(handle.remove)
        if default:
            first = modules[layers[0]]
            before = self._catcher("embeddings", first)
            handle = first.register_forward_pre_hook(lambda module, inputs: before(module, inputs, inputs[0]))
            stack.callback(handle.remove)

    def _catcher(self, name: str, module: nn.Module) -> Callable[..., None]:
        batch_first = getattr(getattr(module, "self_attn", None), "batch_first", True)

        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            state = output if isinstance(output, Tensor) else output[0]
            self.caught[name] = state if batch_first else state.transpose(0, 1)

        return catch

    def __call__(self, batch: Any) -> tuple[tuple[str, ...], list[Tensor]]:
        self.caught.clear()
        if isinstance(batch, Mapping):
            self.model(**batch)
        else:
            self.model(*(batch if isinstance(batch, tuple) else (batch,)))
        silent = [name for name in self.names if name not in self.caught]
        if silent:
            raise ValueError(f"layers: {', '.join(silent)} did not run in the forward pass")
        return self.names, [self.caught[name] for name in self.names]


def encoder_of(model: Any) -> nn.Module:
    """The Hugging Face model inside a SentenceTransformer; any other model itself."""
    if _encode_of(model) is None:
        return model
    first = model[0]
    for name in ("auto_model", "model"):
        if isinstance(getattr(first, name, None), nn.Module):
            return getattr(first, name)
    raise TypeError(f"model: expected a SentenceTransformer that starts with a Transformer, got {type(first).__name__}")


def _encode_of(model: Any) -> Callable[[Any], Any] | None:
    """Texts to batches, where the model is a SentenceTransformer."""
    if not isinstance(model, nn.Sequential):
        return None
    tokenize = getattr(model, "preprocess", None) or getattr(model, "tokenize", None)
    if tokenize is None:
        return None
    accepted = ("input_ids", "attention_mask", "token_type_ids")

    def encode(batch: Any) -> Any:
        batch = tokenize(list(batch)) if isinstance(batch, (list, tuple)) and isinstance(batch[0], str) else batch
        return {name: batch[name] for name in accepted if name in batch}

    return encode


def _ids(batch: Any) -> Tensor:
    found = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 2:
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"batches: expected token ids (B, L), alone, first or as 'input_ids'; got {got}")
    return found


def _moved(batch: Any, model: nn.Module) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(value.to(device) if isinstance(value, Tensor) else value for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _batch_first(name: str, state: Tensor, ids: Tensor) -> Tensor:
    if state.dim() != 3 or state.shape[:2] != ids.shape:
        raise ValueError(
            f"{name}: expected hidden states ({ids.shape[0]}, {ids.shape[1]}, d) for ids of shape"
            f" {tuple(ids.shape)}, got {tuple(state.shape)}"
        )
    return state


def _first_occurrences(tokens: Tensor, seen: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Which tokens are among the first ``most`` of their kind, ``seen`` counted in; and the new counts by id."""
    size = max(len(seen), int(tokens.max()) + 1)
    seen = torch.cat([seen, seen.new_zeros(size - len(seen))])
    order = tokens.sort(stable=True).indices
    counts = tokens.bincount(minlength=size)
    starts = (counts.cumsum(0) - counts)[tokens[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts
    return rank + seen[tokens] < most, seen + counts


def _tracked(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError as missing:
        raise ImportError("progress: a bar needs rich: pip install 'repdeg-fast[cli]'") from missing

    return track(batches, description="reading hidden states", console=Console(stderr=True), transient=True)
