"""The figures that processes wrote one by one, together: one JSON file and one page of tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # as `repdeg-fast bench --json` writes them


def merge(parts: Path, figures: Path) -> list[Row]:
    """The rows of all files in ``parts``, in the order of their names, as one file; without any, what that holds."""
    rows = [row for path in sorted(parts.glob("*.json")) for row in read_figures(path)]
    if not rows:
        return read_figures(figures)
    compare(rows)
    draft = figures.with_name(f"{figures.name}.part")
    draft.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(draft, figures)
    return rows


def compare(rows: Sequence[Row]) -> None:
    """What a provider that had a process of its own could not be compared with there."""
    of_pass: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        of_pass.setdefault((row["op"], row["case"], row["pass"], row["dtype"]), []).append(row)
    for same in of_pass.values():
        measured = [row for row in same if row["ms_median"]]
        eager = next((row["ms_median"] for row in measured if row["provider"] == "eager"), None)
        floor = next((row["ms_median"] for row in measured if row["floor"]), None)
        for row in measured:
            if row["speedup_vs_eager"] is None and eager:
                row["speedup_vs_eager"] = eager / row["ms_median"]
            if row["times_floor"] is None and floor:
                row["times_floor"] = row["ms_median"] / floor


def read_figures(path: Path) -> list[Row]:
    """None where there are none, or where whatever ended the run cut them short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def write(page: Path, name: str, outcomes: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Tables of the figures that there are."""
    lines = [f"# {name.replace('_', ' ')}", "", "Made by `make gpu`.", ""]
    lines += [f"- {stage}: {outcome}" for stage, outcome in outcomes.items()]
    if rows:
        lines += ["- " + ", ".join(f"{key} {value}" for key, value in rows[0]["versions"].items() if value)]
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        of_case = [row for row in rows if (row["op"], row["case"]) == (op, case)]
        lines += ["", f"## {op}: {case}", "", *_table(of_case), *_otherwise(of_case)]
    page.write_text("\n".join(lines) + "\n")


def _table(rows: Iterable[Row]) -> list[str]:
    lines = [
        "| provider | pass | dtype | ms (p20–p80) | host µs | % of roof | peak MB | saved MB | vs eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["provider"], row["pass"], row["dtype"]]
        if row["ms_median"] is None:
            cells += [row["reason"], *[""] * 5]
        else:
            speedup = row["speedup_vs_eager"]
            cells += [
                f"{row['ms_median']:.4g} ({row['ms_p20']:.4g}–{row['ms_p80']:.4g})",
                "" if row["host_us"] is None else f"{row['host_us']:.0f}",
                f"{row['percent_of_roof']:.0f}",
                *("" if row[key] is None else f"{row[key] / 1e6:.3g}" for key in ("peak_bytes", "saved_bytes")),
                "" if speedup is None else f"{speedup:.2f}×",
            ]
            if row["reason"]:
                cells[3] = f"{row['reason']}: {cells[3]}"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _otherwise(rows: Iterable[Row]) -> list[str]:
    """Who was not timed as a graph, and why."""
    named = {
        (row["provider"], row["timing"]) for row in rows if row["timing"] and not row["timing"].startswith("graph")
    }
    return ["", *(f"{provider}: timed with {timing}." for provider, timing in sorted(named))] if named else []
