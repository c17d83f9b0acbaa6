"""The folder that compiled libraries are kept in, and what makes it safe to run code from there."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """``REPDEG_FAST_CACHE_DIR``, else ``repdeg_fast`` under the user's cache folder, or one for temporary files."""
    if chosen := os.environ.get("REPDEG_FAST_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "repdeg_fast"
    try:
        return Path.home() / ".cache" / "repdeg_fast"
    except RuntimeError:  # a container's user may have no home
        return Path(tempfile.gettempdir()) / f"repdeg_fast-{os.getuid()}"


def is_whole(library: Path) -> bool:
    """Whether ``library`` is there and has the checksum that was written beside it (half a millisecond). One that a
    full disk or a stopped machine cut short would end the process that loads it with a signal."""
    try:
        return _checksum_file(library).read_bytes() == _checksum_line(library, library.name).encode()
    except OSError:
        return False


def keep(built: Path, library: Path) -> None:
    """Move the library ``built`` to where it is looked for. Whenever the machine stops, what is there is whole or
    does not agree with its checksum: contents reach the disk before names do."""
    checksum = _checksum_file(built)
    checksum.write_text(_checksum_line(built, library.name))
    for file in (built, checksum):
        _sync(file)
    os.replace(checksum, _checksum_file(library))
    os.replace(built, library)
    _sync(library.parent)


def write(file: Path, text: str) -> None:
    """Write a small file whole: a reader sees what was there before, or all of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, file)


def make_folder(folder: Path) -> None:
    """Make the folder of a library. Raises ``PermissionError`` for one that another user could put a library into."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for place in (folder.parent, folder):
        place.mkdir(mode=0o755, exist_ok=True)
        status = place.stat()
        sticky = place is not folder and status.st_mode & stat.S_ISVTX  # others cannot exchange what lies in it
        group_writes = status.st_mode & stat.S_IWGRP and _has_others(status.st_gid)
        if status.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{place} belongs to another user")
        if not sticky and (status.st_mode & stat.S_IWOTH or group_writes):
            raise PermissionError(f"{place} can be written by others (chmod go-w)")


def _has_others(group: int) -> bool:
    """Whether a group is more than a user's own, whose name it then has: what ``umask 002`` is made for."""
    import grp
    import pwd

    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user may have no name
        return True
    return entry.gr_name != user or bool(set(entry.gr_mem) - {user})


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, so a killed build never blocks the next."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _checksum_line(library: Path, name: str) -> str:
    """As ``sha256sum -c`` reads it."""
    return f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {name}\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
