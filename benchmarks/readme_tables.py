"""Writes the results in ``benchmarks/results/`` into README.md and the pages of docs/, wherever two markers name the
operations: those of ``make gpu`` (``<gpu>.json``) first, then those of CPUs (``repdeg-fast bench --full --seconds 2
--json``). ``python benchmarks/readme_tables.py``
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from repdeg_fast.bench.suite import suites

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"<!-- results of ([\w, ]+): made by `make tables` -->\n.*?<!-- end of results -->", re.DOTALL)
NO_GPU = "No GPU measured yet: run `make gpu` on one, then `make tables`."
_COLUMNS = ("operation", "case", "pass", "ours", "ms", "% of roof", "peak MB", "best rival", "ms", "peak MB", "faster")
_HEAD = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
_COMMAND = {"cuda": "make gpu", "cpu": "repdeg-fast bench --full --seconds 2 --json"}


def documents(root: Path) -> list[Path]:
    """Those with a place for results."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in pages if REGION.search(page.read_text(encoding="utf-8"))]


def main() -> int:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")) if "." not in path.stem]
    pages = documents(ROOT)
    if ROOT / "README.md" not in pages:
        print(f"{ROOT / 'README.md'}: expected two lines as {REGION.pattern!r} has them", file=sys.stderr)
        return 2
    for page in pages:
        page.write_text(REGION.sub(lambda region: _written(region[0], found), page.read_text(encoding="utf-8")))
        print(f"{page}: written")
    return 0


def _written(region: str, found: list[list[dict]]) -> str:
    """The region with the tables of its operations; ``all``: of every one."""
    begin, end = region.splitlines()[0], region.splitlines()[-1]
    names = REGION.match(region)[1].split(", ")  # type: ignore[index]
    tables: dict[str, list[str]] = {"cuda": [], "cpu": []}
    for rows in found:
        measured = [row for row in rows if row["ms_median"] is not None and (names == ["all"] or row["op"] in names)]
        if measured:
            tables[measured[0]["device"]].append(table(measured))
    return "\n\n".join([begin, *(tables["cuda"] or [NO_GPU]), *tables["cpu"], end])


def table(rows: list[dict]) -> str:
    """Our fastest provider of each operation, case and pass beside the fastest of the others."""
    versions, device = rows[0]["versions"], rows[0]["device"]
    named = [f"{key} {versions[key]}" for key in ("torch", "triton", "cuda", "python") if versions.get(key)]
    threads = [f"{versions['threads']} threads"] if device == "cpu" else []
    facts = [versions["device_name"], *threads, versions.get("date", "undated"), *named]
    lines = [f"{', '.join(facts)}; made by `{_COMMAND[device]}`:", "", *_HEAD]
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
        *(best["op"], best["case"], best["pass"], best["provider"].removeprefix("ours-"), _ms(best)),
        *(f"{best['percent_of_roof']:.0f}", _peak(best), rival["provider"], _ms(rival), _peak(rival)),
        f"{rival['ms_median'] / best['ms_median']:.2f}×",
    ]
    return ["| " + " | ".join(cells) + " |"]


def _ms(row: dict) -> str:
    return f"{row['ms_median']:,.0f}" if row["ms_median"] >= 100 else f"{row['ms_median']:.3g}"


def _peak(row: dict) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.3g}"


if __name__ == "__main__":
    sys.exit(main())
