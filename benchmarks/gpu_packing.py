"""Put what was made into one archive, for a machine that is there for minutes and hands back a few small files."""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

LIMIT = 15 << 20  # bytes; what is handed back is often limited to 16 MiB a file
_KINDS = (".md", ".json", ".log", ".png")  # the most telling first; no other is packed, memory snapshots least of all
_LEFT_OUT = "left_out.txt"


def pack(results: Path, name: str, out: Path, limit: int = LIMIT) -> Path | None:
    """All that ``results`` holds of the GPU ``name`` as ``out``/<name>.zip, replaced as a whole; what would exceed the
    limit is named in it. ``None`` and a line on stderr where it cannot be written: a run goes on without."""
    archive, draft = out / f"{name}.zip", out / f".{name}.zip.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as file:
            size, left_out = 0, []
            for path in _in_order(results, name):
                content, inside = path.read_bytes(), str(path.relative_to(results))
                size += len(zlib.compress(content))
                if size > limit:
                    size -= len(zlib.compress(content))
                    left_out.append(f"{inside}: {len(content)} bytes")
                else:
                    file.writestr(inside, content)
            if left_out:
                file.writestr(_LEFT_OUT, "\n".join(left_out) + "\n")
        os.replace(draft, archive)
    except OSError as error:
        print(f"make gpu: cannot write {archive}: {error}", file=sys.stderr)
        return None
    return archive


def _in_order(results: Path, name: str) -> Iterable[Path]:
    """By kind, and the small ones of a kind first."""
    found = [path for path in [*results.glob(f"{name}.*"), *results.glob(f"{name}/**/*")] if path.suffix in _KINDS]
    return sorted(found, key=lambda path: (_KINDS.index(path.suffix), path.stat().st_size, path))
