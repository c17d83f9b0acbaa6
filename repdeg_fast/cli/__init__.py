"""``repdeg-fast bench | profile | tune | inspect | analyze | info``: a file a command."""

from __future__ import annotations

import sys

_PACKAGES = ("rich", "typer")  # of the extra ``cli``


def main() -> None:
    """The script ``repdeg-fast``."""
    try:
        from repdeg_fast.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        print(f"repdeg-fast: the command line needs {error.name}: pip install 'repdeg-fast[cli]'", file=sys.stderr)
        sys.exit(2)
    app()
