"""Writes the results in ``benchmarks/results/`` into README.md and the pages of docs/, wherever two markers name the
operations: those of ``make gpu`` (``<gpu>.json``) first, then those of CPUs (``repdeg-fast bench --full --seconds 2
--json``), with a picture of an operation's first case above its table. ``python benchmarks/readme_tables.py``
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from os.path import relpath
from pathlib import Path

import result_pictures

from repdeg_fast.bench.suite import suites

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"<!-- results of ([\w, ]+): made by `make tables` -->\n.*?<!-- end of results -->", re.DOTALL)
NO_GPU = "No GPU measured yet: run `make gpu` on one, then `make tables`."
_COLUMNS = ("operation", "case", "pass", "faster", "ours", "ms", "% of roof", "peak MB", "best rival", "ms", "peak MB")
_HEAD = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
_COMMAND = {"cuda": "make gpu", "cpu": "repdeg-fast bench --full --seconds 1 --json"}


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
        text = page.read_text(encoding="utf-8")
        page.write_text(REGION.sub(partial(_written, found=found, page=page), text), encoding="utf-8")
        print(f"{page}: written")
    return 0


def _written(region: re.Match[str], found: list[list[dict]], page: Path) -> str:
    """The region of a page with the tables of its operations (``all``: of every one), in docs/ pictures above them."""
    begin, end = region[0].splitlines()[0], region[0].splitlines()[-1]
    names = region[1].split(", ")
    tables: dict[str, list[str]] = {"cuda": [], "cpu": []}
    for rows in found:
        measured = [row for row in rows if row["ms_median"] is not None and (names == ["all"] or row["op"] in names)]
        if measured:
            shown = [] if names == ["all"] or page.parent == ROOT else names
            pictures = [_picture(measured, name, page) for name in shown]
            tables[measured[0]["device"]] += [*filter(None, pictures), table(measured)]
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


def _picture(rows: list[dict], op: str, page: Path) -> str:
    """Drawn to docs/pictures; returns the line that shows it. Empty: the operation was not measured."""
    of_op = [row for row in rows if row["op"] == op and row["pass"] == "forward+backward"]
    first = [row for row in of_op if row["case"] == of_op[0]["case"]]
    ours, rivals = _ours_and_rivals(first)
    if not ours or not rivals:
        return ""
    versions = first[0]["versions"]
    title = f"{op}, {first[0]['case']}, forward and backward: {versions['device_name']}, torch {versions['torch']}"
    path = ROOT / "docs" / "pictures" / f"{op}-{re.sub(r'[^A-Za-z0-9]+', '-', versions['device_name'])}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result_pictures.bars([*ours, *rivals], title), encoding="utf-8")
    return f"![{title}]({relpath(path, page.parent)})"


def _ours_and_rivals(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Those that were measured and right, without the floors."""
    if not rows:
        return [], []
    floors = {provider.name for provider in suites()[rows[0]["op"]].providers if provider.floor}
    right = [row for row in rows if row["ms_median"] is not None and row["provider"] not in floors]
    ours = [row for row in right if row["provider"].startswith("ours") and not row["reason"]]
    return ours, [row for row in right if not row["provider"].startswith("ours")]


def _compare(rows: list[dict]) -> list[str]:
    ours, rivals = _ours_and_rivals(rows)
    if not ours or not rivals:
        return []
    best, rival = (min(some, key=lambda row: row["ms_median"]) for some in (ours, rivals))
    cells = [
        *(best["op"], best["case"], best["pass"], f"{rival['ms_median'] / best['ms_median']:.2f}×"),
        *(best["provider"].removeprefix("ours-"), _ms(best), f"{best['percent_of_roof']:.0f}", _peak(best)),
        *(rival["provider"], _ms(rival), _peak(rival)),
    ]
    return ["| " + " | ".join(cells) + " |"]


def _ms(row: dict) -> str:
    return f"{row['ms_median']:,.0f}" if row["ms_median"] >= 100 else f"{row['ms_median']:.3g}"


def _peak(row: dict) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.3g}"


if __name__ == "__main__":
    sys.exit(main())
