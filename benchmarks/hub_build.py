"""A build for Hugging Face's kernel Hub: Python and Triton alone, imported from any folder, under any name.

``python benchmarks/hub_build.py OUT`` writes ``OUT/build.toml`` and ``OUT/torch-ext/repdeg_fast/``: the operations and
their modules without C++ sources (Triton serves, or PyTorch), with relative imports only, since the Hub's loader names
a package itself, and with an operator namespace of its own, named after its contents, so that several versions can
be loaded into one process, the installed package among them.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("analysis", "bench", "cli", "data", "integrations", "models", "training", "__main__.py")
BUILD_TOML = '[general]\nname = "repdeg_fast"\nuniversal = true\n'
NAMESPACE_LINE = 'NAMESPACE = "repdeg_fast"'


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    print(write(Path(sys.argv[1])))
    return 0


def write(out: Path) -> Path:
    """Returns the package's folder."""
    sources = {path: _relative(path, text) for path, text in _sources().items()}
    digest = hashlib.sha256("\0".join(f"{path}\0{text}" for path, text in sorted(sources.items())).encode()).hexdigest()
    sources["ops/_operator.py"] = sources["ops/_operator.py"].replace(
        NAMESPACE_LINE, NAMESPACE_LINE.replace("repdeg_fast", f"repdeg_fast_{digest[:8]}")
    )
    package = out / "torch-ext" / "repdeg_fast"
    for path, text in sources.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text, encoding="utf-8")
    (out / "build.toml").write_text(BUILD_TOML, encoding="utf-8")
    return package


def _sources() -> dict[str, str]:
    """By their place in the package."""
    package = ROOT / "repdeg_fast"
    found = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    found |= {f"triton_kernels/{path.name}": path for path in (ROOT / "triton_kernels").glob("*.py")}
    kept = {place: path for place, path in found.items() if place.split("/")[0] not in LEFT_OUT}
    return {place: path.read_text(encoding="utf-8") for place, path in sorted(kept.items())}


def _relative(place: str, text: str) -> str:
    """``from repdeg_fast.a import b`` as seen from ``place``; nothing of what is left out."""
    if place == "__init__.py":
        text = re.sub(r"^from repdeg_fast import .*", "from repdeg_fast import backends", text, flags=re.MULTILINE)
        text = re.sub(rf'^    "({"|".join(LEFT_OUT)})",\n', "", text, flags=re.MULTILINE)
    dots = "." * (place.count("/") + 1)
    return re.sub(
        r"^( *)from repdeg_fast(?:\.([\w.]+))? import\b", rf"\1from {dots}\2 import", text, flags=re.MULTILINE
    )


if __name__ == "__main__":
    sys.exit(main())
