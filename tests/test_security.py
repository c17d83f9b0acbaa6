"""What docs/security.md says of our own sources: nothing that is read can run code, nothing predictable is written."""

import ast
import os
import stat
import tempfile
from pathlib import Path

import pytest

from repdeg_fast.analysis.report.page import Report, Section, html
from repdeg_fast.native import build, cache

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("repdeg_fast", "triton_kernels", "benchmarks", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
FORBIDDEN = {
    *("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "numpy.load", "joblib.load"),
    *("os.system", "os.popen", "tempfile.mktemp"),
}
NETWORK = {"http", "urllib", "requests", "httpx", "socket", "ftplib", "huggingface_hub"}


def complaints(source):
    """What a reviewer would stop at, by line."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in NETWORK)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN:
            yield f"{node.lineno}: {called}"
        if called == "torch.load" and options.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        for option in ("shell", "trust_remote_code"):
            if options.get(option, "False") != "False":
                yield f"{node.lineno}: {option}={options[option]}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(f, weights_only=True)", 0),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("pickle.load(f)", 1),
        ("subprocess.run(c, shell=True)", 1),
        ("AutoModel.from_pretrained(n, trust_remote_code=True)", 1),
        ("import urllib.request", 1),
        ("from requests import get", 1),
        ("model.eval()", 0),
    ],
)
def test_the_reviewer_sees(source, found):
    assert len(list(complaints(source))) == found


def test_nothing_read_can_run_code_and_nothing_is_sent():
    assert len(SOURCES) > 100
    found = [f"{path.relative_to(ROOT)}:{text}" for path in SOURCES for text in complaints(path.read_text("utf-8"))]
    assert not found


def test_without_a_home_kernels_lie_in_a_folder_of_this_user_among_temporary_files(tmp_path, monkeypatch):
    for name in ("REPDEG_FAST_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o1777)

    def no_home():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    root = cache.cache_root()
    assert root == tmp_path / f"repdeg_fast-{os.getuid()}"
    cache.make_folder(root / "library")
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    root.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        cache.make_folder(root / "library")


def test_a_library_that_was_exchanged_is_not_loaded(tmp_path, monkeypatch):
    built, library = tmp_path / "built.so", tmp_path / "library.so"
    built.write_bytes(b"ours")
    cache.keep(built, library)
    assert cache.is_whole(library)
    library.write_bytes(b"another's")
    assert not cache.is_whole(library)
    monkeypatch.setattr(build, "_library_path", lambda _: library)
    monkeypatch.setattr(build, "_import", lambda _: pytest.fail("loaded"))
    monkeypatch.setattr(build, "_compile", lambda *_: "compiled anew")
    assert build._build_and_import("cpu") == "compiled anew"


def test_reports_escape_what_comes_from_models():
    text = "<script>alert(1)</script>"
    page = html(Report(text, text, [text], [Section(text, text)], {}, [text]))
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;") >= 5
