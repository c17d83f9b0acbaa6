"""``python -m repdeg_fast`` is the ``repdeg-fast`` command."""

from repdeg_fast.cli import main

main()
