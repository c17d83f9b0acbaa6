"""README and the pages of docs/: their Python runs as it stands, their links lead somewhere, they build."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import repdeg_fast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name, text in TEXTS.items()
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("block", BLOCKS)
def test_runs(block, monkeypatch, capsys):
    for package in ("transformers", "sentence_transformers", "accelerate", "lightning"):
        if re.search(rf"\b{package}\b|models\.amos" if package == "transformers" else rf"\b{package}\b", block):
            pytest.importorskip(package)
    if accelerate := sys.modules.get("accelerate"):  # one process has one state, which another block may have made
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    exec(block, {"__name__": "__main__"})


def test_finds_the_blocks():
    assert len(BLOCKS) > 12
    written = [name for name in TEXTS if name.startswith("docs/operations/")]
    assert {block.id.rpartition("-")[0] for block in BLOCKS} >= {"README.md", "docs/index.md", *written}


def slugs(text):
    """As mkdocs and GitHub make anchors of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_resolve(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in slugs(linked.read_text(encoding="utf-8")), target


def test_the_readme_is_two_screens():
    assert len(TEXTS["README.md"].splitlines()) <= 80


COMMANDS = {
    command: name
    for name, text in TEXTS.items()
    for block in re.findall(r"```sh\n(.*?)^```|`(repdeg-fast .*?)`", text, re.MULTILINE | re.DOTALL)
    for command in re.findall(r"^repdeg-fast [^#\n]*[^#\s]", "\n".join(block), re.MULTILINE)
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    """Options, operations and cases, that is; tests of the command line run them."""
    pytest.importorskip("typer")
    from typer.main import get_command

    from repdeg_fast.bench.suite import select
    from repdeg_fast.cli.app import app

    _, name, *arguments = shlex.split(command)
    context = get_command(app).commands[name].make_context(name, arguments)
    if name in ("bench", "profile"):
        ops, cases = (context.params.get(key, "") for key in ("ops", "cases"))
        select(list(filter(None, ops.split(","))), list(filter(None, cases.split(","))), [], torch.device("cpu"))


def test_the_makefile_has_the_targets_that_are_named():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = "\n".join(re.findall(r"```sh\n.*?^```|`make \w+", "\n".join(TEXTS.values()), re.MULTILINE | re.DOTALL))
    named = set(re.findall(r"^`?make (\w+)", shown, re.MULTILINE))
    assert {"bench", "test"} <= named <= set(targets)


@pytest.mark.parametrize("name", TEXTS)
def test_lists_have_an_empty_line_before_them(name):
    """GitHub needs none, the built pages do."""
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    assert not re.findall(r"^(?![-*\d ]).+\n[-*] .*", prose, re.MULTILINE)


def test_every_public_name_has_its_place():
    """In the API of a page, that is."""
    shown = {name for text in TEXTS.values() for name in re.findall(r"^::: repdeg_fast\.(\w+)$", text, re.MULTILINE)}
    assert shown == set(repdeg_fast.__all__) - {"backends", "data", "models"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    # compiled kernels are one table that takes as long as all other pages
    hidden = "*.py\nbenchmarks/KERNELS.md"
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True, exclude_docs=hidden))
    return folder


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(site):
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert len(pages) >= len(TEXTS)
    for text in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\">\s]+)", text)
        loaded += re.findall(r"<link [^>]*rel=\"?(?:stylesheet|icon|preload)[^>]*href=\"?([^\">\s]+)", text)
        assert not [url for url in loaded if "//" in url]
        assert "mermaid" not in text  # the theme would load its program when the page is shown


def test_the_api_is_in_the_page(site):
    page = (site / "operations/linear_cross_entropy.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert ":::" not in text
    assert "hidden_states: Tensor,  # (..., d)" in text
    assert "label_smoothing: in [0, 1]." in text
    assert ":func:" not in text
    contributing = (site / "contributing.html").read_text(encoding="utf-8")
    assert 'href="design.html"' in contributing


def test_docstrings_become_markdown(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import site_pages

    monkeypatch.delitem(sys.modules, "site_pages")
    text = "What :func:`a.b.name` does (:class:`~x.Y`, :mod:`the\nlot <z>`).\n\nExample::\n\n    f(1)\n    g(2)\n\n"
    text += "Args:\n    one, two: first\n        and more: here.\n    three: x.\n\nReturns:\n    A sum: of\n    both."
    assert site_pages.docstring(text) == (
        "What `name` does (`Y`, `lot`).\n\nExample:\n\n```python\nf(1)\ng(2)\n```\n\n"
        "**Args**\n\n- **one, two**: first\n    and more: here.\n- **three**: x.\n\n\n**Returns**\n\nA sum: of\nboth."
    )
