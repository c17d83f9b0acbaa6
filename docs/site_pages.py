"""Hooks of mkdocs: pages that live elsewhere in the repository, links to them, the API.

In a page a line ``::: repdeg_fast.cosine_regularization`` stands for the signature of
that function or class, with the shapes that its source notes, and its docstring.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# page -> its file in the repository, where that is not docs/<page>
HOMES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    **{
        page: page
        for page in (
            "benchmarks/BUDGET.md",
            "benchmarks/KERNELS.md",
            "benchmarks/NOTES.md",
        )
    },
}
PAGES = {home: page for page, home in HOMES.items()}
_WIDTH = 88  # characters of a line of code on the page, in a window of a laptop
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for page, home in HOMES.items():
        files.append(
            File.generated(
                config, page, content=(ROOT / home).read_text(encoding="utf-8")
            )
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    markdown = LINK.sub(lambda link: _link(uri, *link.groups()), markdown)
    return re.sub(
        r"^::: ([\w.]+)$", lambda name: api(name[1]), markdown, flags=re.MULTILINE
    )


def _link(uri: str, text: str, target: str, anchor: str | None) -> str:
    """Links are written as they work in the repository. That of a source file, which
    has no page, becomes its text."""
    home = HOMES.get(uri, f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(home), target))
    page = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
    if page is None:
        return text
    relative = posixpath.relpath(page, posixpath.dirname(uri) or ".")
    return f"[{text}]({relative}{anchor or ''})"


def api(path: str) -> str:
    """Signature and docstring of a public name, in Markdown."""
    module, _, name = path.rpartition(".")
    thing = inspect.unwrap(getattr(importlib.import_module(module), name))
    tree = ast.parse(source := textwrap.dedent(inspect.getsource(thing))).body[0]
    lines = source.splitlines()
    parts = [
        f"### `{name}`",
        "```python\n" + _signature(tree, lines) + "\n```",
        docstring(ast.get_docstring(tree)),
    ]
    return "\n\n".join(parts)


def _signature(node: Any, lines: list[str]) -> str:
    """Up to the docstring; of a class also ``__init__`` and ``forward``."""
    head = _fitted("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).rstrip())
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        shown = [
            _signature(part, lines)
            for part in methods
            if part.name in ("__init__", "forward")
        ]
        if [getattr(base, "id", "") for base in node.bases] == [
            "NamedTuple"
        ]:  # its fields are its signature
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            shown = ["\n".join(lines[field.lineno - 1] for field in fields)]
        head = "\n\n".join([head, *shown])
    return head.replace("  # fmt: skip", "")


def _fitted(head: str) -> str:
    """A signature that is wider than the page: an argument a line, as ruff has it."""
    found = re.fullmatch(r"( *)(def \w+\()\s*(.*?),?\s*(\)[^()]*:)", head, re.DOTALL)
    if not found or "#" in head or max(map(len, head.splitlines())) <= _WIDTH:
        return head
    indent, name, arguments, end = found.groups()
    cuts = re.split(r",\s+(?![^\[(]*[\])])", arguments)  # not inside brackets
    return "\n".join(
        [
            indent + name,
            *(f"{indent}    {argument}," for argument in cuts),
            indent + end,
        ]
    )


def docstring(text: str | None) -> str:
    """Google's sections and Sphinx's roles as Markdown."""
    text = re.sub(r":\w+:`[^`<]*?(\w+)(?:\s*<[^>]*>)?`", r"`\1`", text or "")
    text = re.sub(r"(?m)^(?:=+ +)+=+$(?s:.*?)^$", _table, text + "\n\n")
    text = re.sub(r"(?m)^(.*):?:\n\n((?:    .*\n|\n)+)", _example, text)
    return re.sub(
        r"(?m)^(Args|Attributes|Returns|Raises):\n((?:    .*\n|\n)+)", _section, text
    ).strip()


def _example(found: re.Match[str]) -> str:
    title, block = found[1].rstrip(":"), found[2]
    return f"{title}:\n\n```python\n{textwrap.dedent(block).strip()}\n```\n\n"


def _table(found: re.Match[str]) -> str:
    """One of reStructuredText: lines of = above and below the head, and at the end."""
    rule, head, _, *rows = found[0].strip().splitlines()
    starts = [column.start() for column in re.finditer("=+", rule)]

    def cells(line: str) -> str:
        ends = [*starts[1:], None]
        texts = (
            line[start:end].strip().replace("``", "`")
            for start, end in zip(starts, ends, strict=True)
        )
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return (
        "\n".join([cells(head), "|" + "---|" * len(starts), *map(cells, rows[:-1])])
        + "\n"
    )


def _section(found: re.Match[str]) -> str:
    title, body = found[1], textwrap.dedent(found[2])
    if title != "Returns":
        body = re.sub(
            r"(?m)^([\w*][\w*, .…]*): ", lambda item: f"- **{item[1]}**: ", body
        )
    return f"**{title}**\n\n{body}\n"
