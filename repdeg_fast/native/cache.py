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
        others_write = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (os.geteuid(), 0) or others_write:
            raise PermissionError(f"{place} belongs to another user or can be written by all")


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
