"""A report as one HTML file that needs nothing else, a JSON file with every number, and PNG files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from repdeg_fast.analysis.report.charts import Chart
from repdeg_fast.analysis.report.png import save_png
from repdeg_fast.analysis.report.svg import svg


@dataclass(frozen=True)
class Section:
    """A heading, what to know for reading it, and pictures or a table."""

    title: str
    text: str
    charts: Sequence[Chart] = ()
    table: Sequence[Sequence[str]] = ()  # the first row is the head


@dataclass(frozen=True)
class Report:
    title: str
    about: str
    findings: list[str]  # sentences with numbers, the most important first
    sections: list[Section]
    numbers: dict[str, Any]  # for JSON
    notes: list[str] = field(default_factory=list)  # how it was measured


def write(report: Report, folder: Path, tick: Callable[[str], None] = lambda what: None) -> list[Path]:
    """Writes report.html, report.json and a PNG a picture; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "report.html", folder / "report.json"
    page.write_text(html(report), encoding="utf-8")
    numbers.write_text(json.dumps(_finite(report.numbers), indent=1) + "\n", encoding="utf-8")
    pictures = []
    for number, chart in enumerate((one for section in report.sections for one in section.charts), 1):
        tick(chart.title)
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")[:80]
        pictures.append(save_png(chart, folder / f"{number:02}-{name}.png"))
    return [page, numbers, *pictures]


def html(report: Report) -> str:
    parts = [
        f"<h1>{_breakable(report.title)}</h1><p class='about'>{_words(report.about)}</p>",
        "<h2>What was found</h2><ul>",
    ]
    parts += [f"<li>{_words(sentence)}</li>" for sentence in report.findings]
    parts.append("</ul>")
    for section in report.sections:
        parts.append(f"<section><h2>{escape(section.title)}</h2><p>{_words(section.text)}</p>")
        if section.table:
            parts.append(_table(section.table))
        if section.charts:
            parts.append("<div class='charts'>")
            for chart in section.charts:
                parts.append(f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg(chart)}</figure>")
            parts.append("</div>")
        parts.append("</section>")
    if report.notes:
        parts.append("<section><h2>How it was measured</h2><ul>")
        parts += [f"<li>{_words(note)}</li>" for note in report.notes]
        parts.append("</ul></section>")
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body><main>"
    )
    return head + "".join(parts) + "</main></body></html>\n"


def _words(text: str) -> str:
    """A number and its per cent stay on one line."""
    return escape(text).replace(" %", "\u00a0%")


def _breakable(words: str) -> str:
    """Long names of tensors and files break after their dots, underlines and slashes."""
    return re.sub(r"([._/])", r"\1<wbr>", escape(words))


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<div class='wide'><table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table></div>"


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#566173;--line:#d8dde5;--page:#fbfcfd;--card:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa6b6;--line:#333c49;--page:#12161c;--card:#1a2028}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:34px 0 6px}
p,ul{max-width:72ch;margin:6px 0 12px;overflow-wrap:anywhere}
ul{padding-left:1.2em}
li{margin:5px 0}
.about{color:var(--soft)}
section>p{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}
figure{margin:0;padding:12px;background:var(--card);border:1px solid var(--line);border-radius:8px;max-width:640px}
figcaption{font-weight:600;margin-bottom:6px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}
svg .grid{stroke:var(--line)}
svg .origin{stroke:#e03131;stroke-width:2.5;fill:none}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
"""
