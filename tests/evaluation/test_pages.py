"""Reports in a browser: they fit a desk and a phone, in light and dark, and an accessibility checker finds nothing."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import BROWSERS, axe_core
from small_classifier import DIGITS, EPS

from mimir_fast.evaluation import comparison
from mimir_fast.evaluation import results as results_module
from mimir_fast.evaluation.charts import LEFT, Line, line_chart
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A finished evaluation with most sections."""
    import torch
    from small_classifier import train_small

    folder = tmp_path_factory.mktemp("pages")
    torch.jit.script(train_small()).save(str(folder / "small.ts"))
    config = EvaluateConfig(
        str(folder / "small.ts"), data=DIGITS, eps=EPS, limit=24, output_dir=str(folder / "out"), unforeseen="yes",
        transfer_from=(str(folder / "small.ts"),), targets=2,
    )  # fmt: skip
    return evaluate(config, log=lambda line: None)


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    return render(results)


def in_browser(page: str, folder: Path, width: int, dark: bool, probe: str) -> Any:
    """What a script in the page says after it has loaded, in headless Chromium; in a frame of the given width, as the
    window of a headless browser cannot be made as narrow as a phone."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    script = f"<script>addEventListener('load', async () => {{ {probe} }});</script>"
    (folder / "page.html").write_text(page.replace("</head>", script + "</head>"))
    (folder / "frame.html").write_text(
        "<!doctype html><title></title><script>addEventListener('message', e => { document.title = e.data })</script>"
        f'<iframe src="page.html" style="width:{width}px;height:3000px;border:0"></iframe>'
    )
    dark_flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom", *dark_flags,
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    title = re.search(r"<title>(.+?)</title>", shown, re.S)
    assert title, shown[:500]
    return json.loads(unescape(title.group(1)))


FITS = """
  const root = document.documentElement, images = [...document.images], charts = [...document.querySelectorAll('svg')];
  parent.postMessage(JSON.stringify({page: root.scrollWidth, window: root.clientWidth, charts: charts.length,
    dark: getComputedStyle(document.body).backgroundColor, broken: images.filter(i => !i.naturalWidth).length,
    wide: [...images, ...charts].filter(i => i.getBoundingClientRect().right > root.clientWidth + 1).length}), "*");
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_the_browser(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    seen = in_browser(page, tmp_path, width, dark, FITS)
    assert seen["window"] == width
    assert seen["page"] <= width, "the page scrolls sideways"
    assert seen["charts"] >= 5 and seen["broken"] == seen["wide"] == 0
    assert (seen["dark"] == "rgb(255, 255, 255)") is not dark


def test_six_models_of_long_names_fit_without_scrolling(results: Results, tmp_path: Path) -> None:
    """At 1280 pixels, tables and legends too; the ends of the names, which tell runs apart, are seen."""
    names = [
        f"runs/cifar10/mimir_vit_base_patch4-finetuned-trades_beta6-seed{i}-with-a-long-name-{i}" for i in range(6)
    ]
    page = comparison.html([comparison.Evaluation(name, Path(name), results) for name in names])
    probe = """
      const cut = [...document.querySelectorAll('.frame')].filter(f => f.scrollWidth > f.clientWidth + 1).length;
      const out = [...document.querySelectorAll('svg text')].filter(t =>
        t.getBoundingClientRect().right > t.closest('svg').getBoundingClientRect().right + 1).length;
      parent.postMessage(JSON.stringify({cut, out, page: document.documentElement.scrollWidth}), "*");
    """
    assert in_browser(page, tmp_path, 1280, False, probe) == {"cut": 0, "out": 0, "page": 1280}
    assert re.search("with-a-long-name-5[^<]*</text>", page) and "<h1>Comparison of 6 models</h1>" in page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_violation(page: str, tmp_path: Path, dark: bool) -> None:
    """Contrast, names of images and frames, order of headings, table headers: axe-core's whole list."""
    axe = axe_core()
    if axe is None:
        pytest.skip("no axe-core here: npm install axe-core")
    probe = """
      document.querySelectorAll('details').forEach(d => { d.open = true; });
      const found = await axe.run();
      parent.postMessage(JSON.stringify({passes: found.passes.length,
        violations: found.violations.map(v => v.id + ': ' + v.nodes[0].html.slice(0, 200))}), "*");
    """
    whole = page.replace("</head>", f"<script>{axe.read_text()}</script></head>", 1)
    seen = in_browser(whole, tmp_path, 1280, dark, probe)
    assert seen["violations"] == [] and seen["passes"] > 15


def test_nothing_is_loaded_and_every_figure_speaks(page: str) -> None:
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from anywhere"
    charts = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]+)"', page)
    assert len(charts) == page.count("<svg") and all(len(words) > 30 for words in charts)
    assert 'name="viewport"' in page and "<title>" in page
    heads = re.findall(r"<th[ >][^>]*>?", page)
    assert heads and all("scope=" in head for head in heads)
    assert not re.search(r"\bnan\b|NaN", re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S))


def test_names_are_escaped_and_scripts_stay_data(results: Results) -> None:
    evil = '</script><script>alert("x")</script>'
    copy = Results(**{**results.__dict__, "choices": {**results.choices, "checkpoint": evil}, "notes": [evil]})
    page = render(copy)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_two_verdicts_never_mix(results: Results) -> None:
    """A failed check colours the second box only; a fragile model the first only."""
    import copy

    masked = copy.deepcopy(results)
    masked.sections["masking"]["checks"][0]["passed"] = False
    kinds = (results_module.robustness_verdict(masked)["kind"], results_module.validity_verdict(masked)["kind"])
    assert kinds == (results_module.robustness_verdict(results)["kind"], "bad")
    fragile = copy.deepcopy(results)
    fragile.sections["accuracy"]["robust"] = {"correct": 0, "total": 24, "accuracy": 0.0, "interval": [0.0, 0.14]}
    kinds = (results_module.robustness_verdict(fragile)["kind"], results_module.validity_verdict(fragile)["kind"])
    assert kinds == ("bad", results_module.validity_verdict(results)["kind"])
    whole = copy.deepcopy(results)
    whole.sections["autoattack"] = {"whole": True, "title": "AutoAttack", "total": 24, "images": 24}
    assert results_module.validity_verdict(whole)["kind"] == "good"


def test_the_name_of_an_axis_stands_above_its_ticks() -> None:
    """Beside them, turned by a quarter, it ran into numbers of five digits."""
    chart = line_chart([Line("loss", [(0, -0.00251), (1, 0.00249)])], "words", x_label="step", y_label="cross-entropy")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)', chart)
    ticks = [(float(y), text) for x, y, text in found if x == str(LEFT - 6)]
    (name,) = [float(y) for _, y, text in found if text == "cross-entropy"]
    assert len(ticks) >= 3 and "rotate" not in chart
    assert name <= min(y for y, _ in ticks) - 14
    assert max(len(text) for _, text in ticks) * 7.5 < LEFT, "ticks fit beside the axis"
