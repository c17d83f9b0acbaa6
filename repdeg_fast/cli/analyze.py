"""``repdeg-fast analyze``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from repdeg_fast._checks import InputError
from repdeg_fast.analysis import pictures
from repdeg_fast.cli import outputs
from repdeg_fast.cli.console import progress, stdout


def analyze(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to run it on, a passage a line.")],
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="A second model with the same tokenizer.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes; default: beside you, named after MODEL.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the text, to read at most.")] = 100_000,
    points: Annotated[int, typer.Option(min=100, help="Tokens for what needs all pairs of them.")] = 10_000,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a line that are kept.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Lines in a batch.")] = 32,
    clusters: Annotated[int, typer.Option(min=2, help="For mutual information.")] = 1000,
) -> None:
    """Say what happens to representations from layer to layer, in a report: HTML, JSON and PNG.

    Mutual information with the input token, change of layers, influence of tokens, token identity, position, CKA of
    all layers, degeneration, and pictures by PCA and t-SNE; of one model, or of two on the same text.
    """
    pictures.pyplot()
    try:
        import sklearn  # noqa: F401
    except ImportError as missing:
        raise InputError("analyze needs scikit-learn: pip install 'repdeg-fast[analysis]'") from missing
    from repdeg_fast.analysis import report, texts

    folder = out or Path(f"{model.resolve().name}-analysis")
    outputs.check_folder("out", folder)
    console = stdout()
    loaded = [(path, *texts.load_model(path)) for path in filter(None, (model, compare))]
    _, _, tokenizer = loaded[0]
    for _, one, own in loaded:
        texts.check_length(length, one, own)
    passages = texts.Text(text, tokenizer, tokens, length, batch)
    for path, _, other in loaded[1:]:
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"compare: {path} has another vocabulary than {model}; expected the same tokenizer")
    steps = sum(-(-len(passages.ids) // batch) + 10 for _ in loaded)
    names = [path.resolve().name for path, _, _ in loaded]
    if len(set(names)) < len(names):
        names = [str(path) for path, _, _ in loaded]
    if len(set(names)) < len(names):  # a model beside itself
        names[1] += " (2)"
    with progress(steps) as tick, _measures_of(model):
        found = [
            texts.measure(name, one, passages, points, tick) for name, (_, one, _) in zip(names, loaded, strict=True)
        ]
        made = report.model_report(
            *found, name_of=tokenizer.convert_ids_to_tokens, clusters=clusters, tick=lambda what: tick(what, 0)
        )
        paths = report.write(made, folder, lambda what: tick(what, 0))
    for sentence in made.findings:
        console.print(f"- {sentence}", soft_wrap=True, markup=False)
    console.print(f"report: {paths[0]}, {paths[1].name} and {len(paths) - 2} pictures", soft_wrap=True, markup=False)


@contextmanager
def _measures_of(model: Path) -> Iterator[None]:
    """What a measure says of a model's NaN, or of layers where nothing varies, is a user's error here."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"model: {model}: {error}") from error
