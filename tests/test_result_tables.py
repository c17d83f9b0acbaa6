"""The committed documents that commands write: README's result tables and the budget."""

import json
from xml.etree import ElementTree

import budget
import pytest
import readme_tables
import torch

from repdeg_fast.bench.suite import Work, suites

BEGIN, END = "<!-- results of all: made by `make tables` -->", "<!-- end of results -->"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path / "results")
    readme_tables.RESULTS.mkdir()
    (tmp_path / "README.md").write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/cosreg.md").write_text(f"{BEGIN.replace('all', 'cosreg, gumbel_mix')}\n{END}\n")
    return readme_tables


def readme(tables):
    return (tables.ROOT / "README.md").read_text()


def row(provider, ms, **changes):
    versions = {"device_name": "NVIDIA H200", "date": "2026-11-20", "torch": "2.11.0", "triton": None}
    names = {"op": "linear_cross_entropy", "case": "amos-base", "pass": "forward+backward", "provider": provider}
    figures = {"ms_median": ms, "percent_of_roof": 71.6, "peak_bytes": 12e6, "reason": None, "device": "cuda"}
    return {**names, **figures, "versions": versions, **changes}


def test_gains_are_a_line_an_operation(tables):
    (tables.ROOT / "README.md").write_text(
        "<!-- gains of contrastive, training_step: made by `make tables` -->\n<!-- end of gains -->"
    )
    ours = row("ours-cpu", 4.0, op="contrastive", peak_bytes=1234e6)
    rows = [row("eager", 9.0, op="contrastive"), row("info-nce-pytorch", 6.0, op="contrastive"), ours]
    (tables.RESULTS / "NVIDIA_H200.json").write_text(json.dumps(rows))
    assert tables.main() == tables.main() == 0
    text = readme(tables)
    assert "| contrastive loss, `amos-base` | 9 ms | – | **4 ms** | 1.50× | 12 → 1,234 MB |" in text
    assert "by `make gpu`. *Here*: the fastest of ours (cpu)." in text
    rows = [{**each, "device": "cpu", "versions": {**each["versions"], "threads": 2}} for each in rows]
    (tables.RESULTS / "NVIDIA_H200.json").write_text(json.dumps(rows))
    assert tables.main() == 0
    assert "`repdeg-fast bench --ops contrastive,training_step --cases amos-base`" in readme(tables)


def test_without_results_the_readme_says_so(tables):
    (tables.RESULTS / "NVIDIA_H200.tuning.json").write_text("[]")
    assert tables.main() == tables.main() == 0
    assert readme(tables) == f"before\n\n{BEGIN}\n\n{tables.NO_GPU}\n\n{END}\n\nafter\n"


def test_a_cpu_is_no_gpu(tables):
    versions = {"device_name": "EPYC", "date": "2026-11-20", "torch": "2.13.0", "threads": 2}
    rows = [row(name, ms, device="cpu", versions=versions) for name, ms in (("eager", 2000.0), ("ours-cpu", 1000.0))]
    (tables.RESULTS / "EPYC.json").write_text(json.dumps(rows))
    assert tables.main() == 0
    text = readme(tables)
    assert text.index(tables.NO_GPU) < text.index(
        "EPYC, 2 threads, 2026-11-20, torch 2.13.0; made by `repdeg-fast bench"
    )
    assert "| ours-cpu" not in text
    assert "| 2.00× | cpu | 1,000 | 72 | 12 | eager | 2,000 | 12 |" in text


def test_our_fastest_beside_the_fastest_of_the_others(tables):
    rows = [
        *(row("eager", 9.0), row("liger", 6.0), row("quack", None, reason="not installed"), row("gemms", 2.0)),
        *(row("ours-streaming-triton", 8.0), row("ours-chunked-triton", 4.0)),
        *(row("ours-chunked-cpu", 1.0, reason="wrong value"), row("ours-chunked-triton", 3.0, case="alone")),
    ]
    (tables.RESULTS / "NVIDIA_H200.json").write_text(json.dumps(rows))
    assert tables.main() == tables.main() == 0
    text = readme(tables)
    assert text.startswith("before\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "NVIDIA H200, 2026-11-20, torch 2.11.0; made by `make gpu`:" in text
    expected = "| amos-base | forward + backward | 1.50× | chunked-triton | 4 | 72 | 12 | liger | 6 | 12 |"
    assert [line for line in text.splitlines() if line.startswith("| linear")] == [f"| linear_cross_entropy {expected}"]
    assert tables.NO_GPU not in text


def test_a_readme_without_markers_is_an_error(tables, capsys):
    (tables.RESULTS / "GPU.json").write_text(json.dumps([row("eager", 9.0)]))
    (tables.ROOT / "README.md").write_text("nothing")
    assert tables.main() == 2
    assert "expected two lines" in capsys.readouterr().err


def test_a_page_has_its_operations_only(tables):
    rows = [
        row(name, ms, op=op) for op in ("cosreg", "admin_norm") for name, ms in (("eager", 9.0), ("ours-cuda", 4.0))
    ]
    (tables.RESULTS / "NVIDIA_H200.json").write_text(json.dumps(rows))
    assert tables.main() == 0
    page = (tables.ROOT / "docs/cosreg.md").read_text()
    assert "| cosreg | amos-base |" in page
    assert "admin_norm" not in page
    assert "| admin_norm | amos-base |" in readme(tables)


def test_a_page_shows_the_bars_of_the_first_case(tables):
    rows = [
        *(row("eager", 9.0, op="cosreg"), row("gemms", 1.0, op="cosreg", peak_bytes=None)),
        *(row("ours-cuda", 3.0, op="cosreg"), row("ours-triton", 2.0, op="cosreg", reason="wrong value")),
        row("quack", None, op="cosreg", reason="not installed"),
        row("ours-cuda", 5.0, op="cosreg", case="later"),
    ]
    (tables.RESULTS / "NVIDIA_H200.json").write_text(json.dumps(rows))
    assert tables.main() == 0
    title = "cosreg, amos-base, forward and backward: NVIDIA H200, torch 2.11.0"
    assert f"![{title}](pictures/cosreg-NVIDIA-H200.svg)" in (tables.ROOT / "docs/cosreg.md").read_text()
    assert "![" not in readme(tables)  # two screens
    picture = ElementTree.parse(tables.ROOT / "docs/pictures/cosreg-NVIDIA-H200.svg").getroot()
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == title
    assert set(words[1:]) == {"ms", "MB at the peak", "3", "9", "12", "ours-cuda", "eager", "gemms", "1"}
    bars = [float(bar.get("width")) for bar in picture.iter("{http://www.w3.org/2000/svg}rect")][1:]
    times = dict(zip(("gemms", "ours-cuda", "eager"), bars, strict=False))  # the fastest first
    assert times["eager"] == pytest.approx(3 * times["ours-cuda"], rel=1e-2)


def test_the_places_name_operations():
    """And each operation has a page with a place for its results."""
    places = [
        (page.name, names.split(", "))
        for page in readme_tables.documents(readme_tables.ROOT)
        for _, names in readme_tables.REGION.findall(page.read_text(encoding="utf-8"))
    ]
    assert ("measured.md", ["all"]) in places
    assert "README.md" in dict(places)
    named = {name for _, names in places for name in names} - {"all"}
    assert set(suites()) <= named


@pytest.mark.parametrize(
    ("op", "dtype", "work", "expected"),
    [
        ("cosreg", torch.float32, Work(48 * 10**8, 1), (1e-3, 1e-3 / 0.9, "bytes")),
        ("linear_cross_entropy", torch.bfloat16, Work(1, 989 * 10**9), (1e-3, 1e-3 / 0.8, "operations")),
        ("linear_cross_entropy", torch.float32, Work(1, 494 * 10**9), (3e-3, 3e-3 / 0.8, "operations")),
    ],
)
def test_floors(op, dtype, work, expected):
    *seconds, bound = budget.floors(op, dtype, work)
    assert seconds == pytest.approx(expected[:2])
    assert bound == expected[2]


def test_the_budget_has_every_gpu_case():
    text = budget.TABLE.read_text(encoding="utf-8")
    for op, suite in suites().items():
        section = text.split(f"## {op}\n")[1].split("## ")[0]
        cases = [case.name for case in suite.cases if "cuda" in case.default_on and case.group is None]
        listed = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines()[3:] if line.startswith("|")]
        assert list(dict.fromkeys(listed)) == cases, "run `make tables`"
