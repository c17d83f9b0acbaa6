"""Writes the results of ``make gpu`` (``benchmarks/results/<gpu>.json``) into README.md, between its two markers.

Without results README.md stays as it is. ``python benchmarks/readme_tables.py``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from repdeg_fast.bench.suite import suites

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: made by `make tables` -->", "<!-- end of results -->"
_HEAD = ["| operation | case | pass | ours | ms | % of roof | best rival | ms | faster |", "|" + "---|" * 9]


def main() -> int:
    tables = [table(path) for path in sorted(RESULTS.glob("*.json")) if "." not in path.stem]  # not .tuning.json
    if not tables:
        print(f"{README}: left as it is; no GPU was measured yet")
        return 0
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{README}: expected one line {BEGIN!r} and one {END!r}", file=sys.stderr)
        return 2
    before, rest = text.split(BEGIN)
    README.write_text("\n".join([before + BEGIN, "", "\n\n".join(tables), "", END]) + rest.split(END)[1])
    print(f"{README}: {len(tables)} table(s)")
    return 0


def table(path: Path) -> str:
    """Our fastest provider of each operation, case and pass beside the fastest of the others."""
    rows = [row for row in json.loads(path.read_text()) if row["ms_median"] is not None]
    versions = rows[0]["versions"] if rows else {}
    named = ", ".join(f"{key} {versions[key]}" for key in ("torch", "triton", "cuda", "python") if versions.get(key))
    title = f"{versions.get('device_name', path.stem)}, {versions.get('date', 'undated')}, {named}:"
    lines = [title, "", *_HEAD]
    for key in dict.fromkeys((row["op"], row["case"], row["pass"]) for row in rows):
        lines += _compare([row for row in rows if (row["op"], row["case"], row["pass"]) == key])
    return "\n".join(lines)


def _compare(rows: list[dict]) -> list[str]:
    floors = {provider.name for provider in suites()[rows[0]["op"]].providers if provider.floor}
    ours = [row for row in rows if row["provider"].startswith("ours") and not row["reason"]]
    rivals = [row for row in rows if not row["provider"].startswith("ours") and row["provider"] not in floors]
    if not ours or not rivals:
        return []
    best, rival = (min(some, key=lambda row: row["ms_median"]) for some in (ours, rivals))
    cells = [
        *(best["op"], best["case"], best["pass"], best["provider"].removeprefix("ours-"), f"{best['ms_median']:.3g}"),
        *(f"{best['percent_of_roof']:.0f}", rival["provider"], f"{rival['ms_median']:.3g}"),
        f"{rival['ms_median'] / best['ms_median']:.2f}×",
    ]
    return ["| " + " | ".join(cells) + " |"]


if __name__ == "__main__":
    sys.exit(main())
