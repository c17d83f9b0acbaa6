"""``repdeg-fast bench | profile | tune | inspect | analyze | info``: a file a command."""

from __future__ import annotations

import importlib.util
import sys

_PACKAGES = ("rich", "safetensors", "typer")  # of the extra ``cli``


def main() -> None:
    """The script ``repdeg-fast``."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        needs = f"the command line needs {', '.join(missing)}: pip install 'repdeg-fast[cli]'"
        print(f"repdeg-fast: {needs}", file=sys.stderr)
        sys.exit(1)
    from repdeg_fast.cli import console
    from repdeg_fast.cli.app import app

    console.spell_out()
    app()
