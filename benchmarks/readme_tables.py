"""Writes the results in ``benchmarks/results/`` into README.md and the pages of docs/, wherever two markers name the
operations: those of ``make gpu`` (``<gpu>.json``) first, then those of CPUs (``repdeg-fast bench --full --seconds 1
--json``). "results" are all of them, with a picture of an operation's first case above; "gains" is one line an
operation. ``python benchmarks/readme_tables.py``
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
REGION = re.compile(r"<!-- (results|gains) of ([\w, ]+): made by `make tables` -->\n.*?<!-- end of \1 -->", re.DOTALL)
NO_GPU = "No GPU measured yet: run `make gpu` on one, then `make tables`."
_COLUMNS = ("operation", "case", "pass", "faster", "ours", "ms", "% of roof", "peak MB", "best rival", "ms", "peak MB")
_HEAD = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
_GAINS = ("one step, forward and backward", "eager", "`torch.compile`", "here", "faster", "peak memory")
_STEPS = {"huggingface_step": "Hugging Face BERT", "training_step": "AMOS", "contrastive": "contrastive loss"}
_COMMAND = {"cuda": "make gpu", "cpu": "repdeg-fast bench --full --seconds 1 --json FILE"}


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
    names = region[2].split(", ")
    tables: dict[str, list[str]] = {"cuda": [], "cpu": []}
    for rows in found:
        measured = [row for row in rows if row["ms_median"] is not None and (names == ["all"] or row["op"] in names)]
        if measured:
            if region[1] == "gains":
                tables[measured[0]["device"]].append(gains(measured, names))
                continue
            pictures = [_picture(measured, name, page) for name in names if name != "all"]
            tables[measured[0]["device"]] += [*filter(None, pictures), table(measured)]
    return "\n\n".join([begin, *(tables["cuda"] or [NO_GPU]), *tables["cpu"], end])


def table(rows: list[dict]) -> str:
    """Our fastest provider of each operation, case and pass beside the fastest of the others."""
    lines = [f"{_facts(rows)}; made by `{_COMMAND[rows[0]['device']]}`:", "", *_HEAD]
    for key in dict.fromkeys((row["op"], row["case"], row["pass"]) for row in rows):
        lines += _compare([row for row in rows if (row["op"], row["case"], row["pass"]) == key])
    return "\n".join(lines)


def gains(rows: list[dict], names: list[str]) -> str:
    """The first case of each operation, both passes: eager, compiled and ours, how much faster than the best peer."""
    lines, shown = ["| " + " | ".join(_GAINS) + " |", "|" + "---|" * len(_GAINS)], []
    for name in names:
        both = [row for row in rows if row["op"] == name and row["pass"] == "forward+backward"]
        ours, rivals = _ours_and_rivals([row for row in both if row["case"] == both[0]["case"]])
        found = {row["provider"]: row for row in rivals}
        if ours and "eager" in found:
            best, rival = (min(some, key=lambda row: row["ms_median"]) for some in (ours, rivals))
            eager, compiled = found["eager"], found.get("compile")
            cells = [
                *(f"{_STEPS[name]}, `{best['case']}`", f"{_ms(eager)} ms", f"{_ms(compiled)} ms" if compiled else "–"),
                *(f"**{_ms(best)} ms**", f"{rival['ms_median'] / best['ms_median']:.2f}×"),
                f"{_peak(eager)} → {_peak(best)} MB",
            ]
            lines.append("| " + " | ".join(cells) + " |")
            shown.append(best)
    command = f"repdeg-fast bench --ops {','.join(names)} --cases {','.join(row['case'] for row in shown)}"
    command = command if rows[0]["device"] == "cpu" else _COMMAND["cuda"]
    providers = ", ".join(row["provider"].removeprefix("ours-") for row in shown)
    notes = f"*Here*: the fastest of ours ({providers}). *Faster*: than the best of all peers."
    return "\n".join([*lines, "", f"{_facts(rows)}; by `{command}`. {notes}"])


def _facts(rows: list[dict]) -> str:
    versions = rows[0]["versions"]
    named = [f"{key} {versions[key]}" for key in ("torch", "triton", "cuda", "python") if versions.get(key)]
    threads = [f"{versions['threads']} threads"] if rows[0]["device"] == "cpu" else []
    return ", ".join([versions["device_name"], *threads, versions.get("date", "undated"), *named])


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
        *(best["op"], best["case"], best["pass"].replace("+", " + "), f"{rival['ms_median'] / best['ms_median']:.2f}×"),
        *(best["provider"].removeprefix("ours-"), _ms(best), f"{best['percent_of_roof']:.0f}", _peak(best)),
        *(rival["provider"], _ms(rival), _peak(rival)),
    ]
    return ["| " + " | ".join(cells) + " |"]


def _ms(row: dict) -> str:
    return _three_digits(row["ms_median"])


def _peak(row: dict) -> str:
    return "" if row["peak_bytes"] is None else _three_digits(row["peak_bytes"] / 1e6)


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    sys.exit(main())
