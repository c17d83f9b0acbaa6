"""Where results go: looked at before the measuring, which can take minutes."""

from __future__ import annotations

import os
from pathlib import Path

from repdeg_fast._checks import InputError


def check_file(option: str, path: Path) -> None:
    """Raises InputError where ``path`` cannot be written; creates nothing."""
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; expected the name of a file")
    if path.exists():
        _check_writable(option, path)
    else:
        check_folder(option, path.parent)


def check_picture(option: str, path: Path) -> None:
    """The same of a picture, which is a PNG whatever its name says."""
    if path.suffix.lower() != ".png" and not path.is_dir():
        raise InputError(f"{option}: pictures are PNG, got {path.name!r}; expected a name such as {path.stem}.png")
    check_file(option, path)


def check_folder(option: str, folder: Path) -> None:
    """Raises InputError where files in ``folder`` could not be written, or it could not be made; creates nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{option}: {there} is a file; expected a folder there")
    _check_writable(option, there)


def _check_writable(option: str, path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise InputError(f"{option}: no permission to write {path}; name another place")
