"""Where results go: looked at before the measuring, which can take minutes, and named so that any case fits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from repdeg_fast.bench.suite import InputError

_LONGEST = 100  # characters of a case's name in a file name, which has room for 255 bytes


def check_file(option: str, path: Path) -> None:
    """Raises InputError where ``path`` cannot be written; creates nothing."""
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; expected the name of a file")
    if path.exists():
        _check_writable(option, path)
    else:
        check_folder(option, path.parent)


def check_folder(option: str, folder: Path) -> None:
    """Raises InputError where files in ``folder`` could not be written, or it could not be made; creates nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{option}: {there} is a file; expected a folder there")
    _check_writable(option, there)


def _check_writable(option: str, path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise InputError(f"{option}: no permission to write {path}; name another place")


def file_name(text: str) -> str:
    """``text`` (a case named after a tensor, say) as part of a file name; of a long one the end, which tells more."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)[-_LONGEST:]
