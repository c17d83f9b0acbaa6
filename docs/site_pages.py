"""Hooks of mkdocs: pages that live elsewhere in the repository, links to them, and the API from docstrings.

In a page a line ``::: repdeg_fast.cosine_regularization`` stands for that function's or class's signature, with the
shapes that its source notes, and its docstring.
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
    **{page: page for page in ("benchmarks/BUDGET.md", "benchmarks/KERNELS.md", "benchmarks/NOTES.md")},
}
PAGES = {home: page for page, home in HOMES.items()}
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for page, home in HOMES.items():
        files.append(File.generated(config, page, content=(ROOT / home).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    markdown = LINK.sub(lambda link: _link(uri, *link.groups()), markdown)
    return re.sub(r"^::: ([\w.]+)$", lambda name: api(name[1]), markdown, flags=re.MULTILINE)


def _link(uri: str, text: str, target: str, anchor: str | None) -> str:
    """Links are written as they work in the repository; a source file has no page, and its link is its text."""
    home = HOMES.get(uri, f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(home), target))
    page = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
    if page is None:
        return text
    return f"[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor or ''})"


def api(path: str) -> str:
    """Signature and docstring of a public name, in Markdown."""
    module, _, name = path.rpartition(".")
    thing = inspect.unwrap(getattr(importlib.import_module(module), name))
    tree = ast.parse(source := textwrap.dedent(inspect.getsource(thing))).body[0]
    lines = source.splitlines()
    parts = [f"### `{name}`", "```python\n" + _signature(tree, lines) + "\n```", docstring(ast.get_docstring(tree))]
    return "\n\n".join(parts)


def _signature(node: Any, lines: list[str]) -> str:
    """From ``class`` or ``def`` to the docstring; of a class also ``__init__`` and ``forward``."""
    head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).rstrip()
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        shown = [_signature(part, lines) for part in methods if part.name in ("__init__", "forward")]
        head = "\n\n".join([head, *shown])
    return head.replace("  # fmt: skip", "")


def docstring(text: str | None) -> str:
    """Google's sections and Sphinx's roles as Markdown."""
    text = re.sub(r":\w+:`[^`<]*?(\w+)(?:\s*<[^>]*>)?`", r"`\1`", text or "")
    text = re.sub(r"(?m)^(=+ +)+=+$(?s:.*?)^$", lambda table: f"```text\n{table[0].rstrip()}\n```\n", text + "\n\n")
    text = re.sub(r"(?m)^(.*):?:\n\n((?:    .*\n|\n)+)", _example, text)
    return re.sub(r"(?m)^(Args|Attributes|Returns|Raises):\n((?:    .*\n|\n)+)", _section, text).strip()


def _example(found: re.Match[str]) -> str:
    title, block = found[1].rstrip(":"), found[2]
    return f"{title}:\n\n```python\n{textwrap.dedent(block).strip()}\n```\n\n"


def _section(found: re.Match[str]) -> str:
    title, body = found[1], textwrap.dedent(found[2])
    if title in ("Args", "Attributes"):
        body = re.sub(r"(?m)^([\w*][\w*, .…]*): ", lambda item: f"- **{item[1]}**: ", body)
    return f"**{title}**\n\n{body}\n"
