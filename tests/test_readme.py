"""README's Python, run as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1])
def test_runs(block):
    if "transformers" in block:
        pytest.importorskip("transformers")
    exec(block, {})


def test_finds_the_blocks():
    assert len(BLOCKS) >= 3
