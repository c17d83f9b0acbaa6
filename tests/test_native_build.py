"""Compiling, keeping and loading the native kernels."""

import grp
import os
import platform
import pwd
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import repdeg_fast
from repdeg_fast import backends
from repdeg_fast.native import build, cache

BINDINGS = """
#include <Python.h>
#include "build_config.h"
static PyObject* build_info(PyObject*, PyObject*) { return Py_BuildValue("{s:s}", "flags", REPDEG_FAST_FLAGS); }
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "repdeg_fast_cpu", "", -1, methods};
PyMODINIT_FUNC PyInit_repdeg_fast_cpu() { return PyModule_Create(&definition); }
"""


@pytest.fixture
def tree(tmp_path):
    """In place of ``csrc/``: a library of nothing but ``build_info``, which compiles in no time."""
    return write_tree(tmp_path / "csrc", BINDINGS)


def write_tree(root, bindings):
    root.mkdir(parents=True)
    (root / "registration.cpp").write_text("")
    (root / "bindings.cpp").write_text(bindings)
    return root


def load(tree, folder, **environment):
    """Load the library of ``tree`` in a new process, which keeps it in ``folder``."""
    code = f"""
from pathlib import Path
from repdeg_fast.native import build
build.source_root = lambda: Path({str(tree)!r})
print(build.build_info()["flags"])
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "REPDEG_FAST_CACHE_DIR": str(folder), **environment},
        timeout=120,
    )


@pytest.fixture
def not_loaded(tmp_path, monkeypatch):
    """As in a new process with an empty cache folder."""
    monkeypatch.setenv("REPDEG_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_failures", {})
    build._library_path.cache_clear()
    backends.forget()
    yield
    build._library_path.cache_clear()
    backends.forget()


def test_build_info():
    info = build.build_info()
    assert set(info) == {"compiler", "flags", "instruction_set", "cuda_architectures"}
    assert "-O3" in info["flags"]
    assert "-ffast-math" not in info["flags"]
    assert build.state("cpu") == "loaded"


def test_cache_follows_flags(monkeypatch, not_loaded):
    before = build._library_path("cpu")
    build._library_path.cache_clear()
    monkeypatch.setattr(build, "compile_flags", lambda: ["-O2"])
    assert build._library_path("cpu") != before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an instruction set of x86-64")
def test_the_instruction_set_is_chosen_by_environment_variable(tree, tmp_path):
    for march, flag in (("x86-64-v2", "-march=x86-64-v2"), ("", "-march=native")):
        result = load(tree, tmp_path / "cache", REPDEG_FAST_MARCH=march)
        assert flag in result.stdout.split(), result.stderr
    assert len(list(tmp_path.rglob("*.so"))) == 2


def test_a_cut_library_is_built_again(tree, tmp_path):
    """Loading one ends the process with a signal."""
    assert load(tree, tmp_path).returncode == 0
    (library,) = tmp_path.rglob("*.so")
    os.truncate(library, library.stat().st_size // 2)
    again = load(tree, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "compiling" in again.stderr
    assert "compiling" not in load(tree, tmp_path).stderr


def test_a_library_that_does_not_load_is_built_again(tree, tmp_path):
    """It was compiled on another machine, say, whose C++ library is a later one."""
    load(tree, tmp_path)
    (library,) = tmp_path.rglob("*.so")
    (tmp_path / "foreign.so").write_bytes(b"no library")
    cache.keep(tmp_path / "foreign.so", library)
    result = load(tree, tmp_path)
    assert "-O3" in result.stdout, result.stderr


def test_a_library_is_whole_if_its_checksum_says_so(tmp_path):
    built, library = tmp_path / "build.so", tmp_path / "library.so"
    assert not cache.is_whole(library)
    built.write_bytes(bytes(range(256)) * 16)
    cache.keep(built, library)
    assert cache.is_whole(library)
    assert subprocess.run(["sha256sum", "-c", "library.sha256"], cwd=tmp_path, capture_output=True).returncode == 0
    with open(library, "r+b") as file:
        file.seek(2000)
        file.write(b"\0")
    assert not cache.is_whole(library)
    library.write_bytes(bytes(range(256)) * 16)
    assert cache.is_whole(library)
    library.with_suffix(".sha256").write_bytes(b"\xff\x00")  # a stopped machine may leave anything
    assert not cache.is_whole(library)
    library.with_suffix(".sha256").unlink()
    assert not cache.is_whole(library)


def test_contents_reach_the_disk_before_names(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append((str(old), str(new))), replace(old, new)))
    built, library = tmp_path / "build.so", tmp_path / "library.so"
    built.write_bytes(b"code")
    cache.keep(built, library)
    assert done.index(str(built)) < done.index((str(built), str(library)))
    checksum, kept = str(built.with_suffix(".sha256")), str(library.with_suffix(".sha256"))
    assert done.index(checksum) < done.index((checksum, kept)) < done.index((str(built), str(library)))
    assert done[-1] == str(tmp_path)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path, monkeypatch, not_loaded):
    """They could put code of theirs there."""
    folder = build._library_path("cpu").parent
    cache.make_folder(folder)
    assert folder.stat().st_mode & 0o022 == 0
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match=f"{folder} can be written by others .*; .*REPDEG_FAST_CACHE_DIR"):
        build.load("cpu")
    folder.chmod(0o1777)  # nor where they cannot exchange a library, but could be first
    with pytest.raises(PermissionError, match="can be written by others"):
        cache.make_folder(folder)
    folder.chmod(0o755)
    folder.parent.chmod(0o1777)  # as /tmp is
    cache.make_folder(folder)
    folder.parent.chmod(0o777)
    with pytest.raises(PermissionError, match=f"{folder.parent} can be written by others"):
        cache.make_folder(folder)
    folder.parent.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        cache.make_folder(folder)


def test_a_group_may_write_if_nobody_else_is_in_it(monkeypatch, not_loaded):
    """With ``umask 002``, where each user has a group of the same name."""
    folder = build._library_path("cpu").parent
    cache.make_folder(folder)
    folder.chmod(0o775)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for name, members, refused in (
        (user, [], False),
        (user, [user], False),
        (user, ["eve"], True),
        ("staff", [], True),
    ):
        entry = grp.struct_group((name, "x", folder.stat().st_gid, members))
        monkeypatch.setattr(grp, "getgrgid", lambda _, entry=entry: entry)
        with pytest.raises(PermissionError, match="can be written by others") if refused else nullcontext():
            cache.make_folder(folder)


def test_a_home_folder_and_characters_that_ninja_reads_as_its_own(tmp_path):
    home = tmp_path / "a $b c:d"
    tree = write_tree(home / "csrc", BINDINGS)
    result = load(tree, "~/cache", HOME=str(home))
    assert "-O3" in result.stdout, result.stderr
    assert len(list((home / "cache").rglob("*.so"))) == 1


def test_a_build_that_fails_says_where_to_start_reading(tmp_path):
    tree = write_tree(tmp_path / "csrc", BINDINGS + "\nint a = no_such_name;\nint b = nor_this_one;\n")
    result = load(tree, tmp_path / "cache")
    assert result.stderr.startswith("repdeg_fast: compiling the cpu kernels (once)... failed\n")
    (log,) = tmp_path.rglob("*.log")
    last = result.stderr.splitlines()[-1]
    assert f"bindings.cpp:{len(BINDINGS.splitlines()) + 2}:" in last
    assert f"(all of it: {log}); install a C++17 compiler" in last
    assert "no_such_name" in last
    assert "nor_this_one" not in result.stderr
    assert "nor_this_one" in log.read_text()


def test_a_build_that_fails_falls_back(monkeypatch, not_loaded):
    def fail(library, name, folder):
        raise RuntimeError("ninja: error: no luck")

    monkeypatch.setattr(build, "_run_compiler", fail)
    with pytest.warns(RuntimeWarning, match=r"falls back .*: compiling the cpu kernels failed: ninja: error: no luck"):
        assert repdeg_fast.cosine_regularization(torch.eye(2)).item() == 0
    assert "no luck" in build.unavailable("cpu")
    assert backends.status()["cosreg"]["cpu"]["serves"] == "reference"


def test_threads_that_load_at_once_share_one_library(monkeypatch, not_loaded):
    """Its operators can be registered once."""
    loaded = []

    def slow(library):
        time.sleep(0.05)
        loaded.append(library)
        return object()

    monkeypatch.setattr(build, "_build_and_import", slow)
    threads = [threading.Thread(target=build.load, args=("cpu",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["cpu"]


def test_processes_that_compile_at_once_share_one_build(tree, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load(tree, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0] * 3, results
    assert sum("compiling" in result.stderr for result in results) == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert not list(tmp_path.rglob("*.o"))


def test_no_home_and_no_ninja_package():
    code = """
import os, pwd, sys
sys.modules["ninja"] = None
pwd.getpwuid = lambda uid: {}[uid]
for name in ("HOME", "XDG_CACHE_HOME", "REPDEG_FAST_CACHE_DIR"):
    os.environ.pop(name, None)
from repdeg_fast.native import build, cache
print(cache.cache_root(), build.state("cpu"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert Path(result.stdout.split()[0]).name == f"repdeg_fast-{os.getuid()}", result.stderr
