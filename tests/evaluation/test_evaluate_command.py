"""`python -m mimir_fast.evaluate` as a user runs it: report, resuming, two processes, a browser's look at the page."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from commands import Command
from small_classifier import EPS, train_small

from mimir_fast.evaluate import config_from
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.suite import evaluate

TESTS = Path(__file__).parents[1]
FLAGS = [
    "--checkpoint", "small_classifier:small_net", "--data.source", "digits", "--data.image_size", "8",
    "--data.channels", "1", "--eps", "40/255", "--limit", "40", "--batch_size", "16",
]  # fmt: skip


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory):
    """The small model where `small_classifier:small_net` finds it."""
    path = tmp_path_factory.mktemp("model") / "weights.pt"
    torch.save(train_small().state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALL_NET", str(path))
        patch.setenv("PYTHONPATH", str(TESTS))
        yield path


@pytest.fixture(scope="module")
def finished(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quick evaluation."""
    from commands import run_module

    folder = tmp_path_factory.mktemp("quick")
    done = run_module(folder, "mimir_fast.evaluate", *FLAGS, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    return folder / "out"


def test_results_hold_every_choice(finished: Path) -> None:
    results = Results.read(finished / "results.json")
    assert results.accuracy["natural"]["total"] == 40 == results.images["count"] == len(results.images["indices"])
    robust = results.accuracy["pgd20"]
    assert 0 < robust["correct"] < results.accuracy["natural"]["correct"]
    assert robust["parameters"] == {
        "eps": EPS, "alpha": EPS / 4, "num_steps": 20, "random_start": True, "loss": "ce", "seed": 0,
    }  # fmt: skip
    assert robust["largest_linf"] <= EPS + 1e-6
    assert results.choices["eps_text"] == "40/255" and results.choices["preprocessing"]
    assert results.environment["packages"]["torch"] and "commit" in results.environment
    assert len(results.checks) == 6 and results.curve["eps"][0] == 0
    assert "AutoAttack was not run" in " ".join(results.verdict)


def test_report_stands_alone(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from anywhere"
    assert page.count("data:image/png;base64,") >= 3
    assert 'name="viewport"' in page
    for words in ("PGD-20", "Are the gradients honest?", "AutoAttack was not run", "40/255"):
        assert words in page


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_the_browser(finished: Path, tmp_path: Path, width: int) -> None:
    """In headless Chromium: no sideways scrolling of the page, every picture decoded and no wider than its column."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    probe = """<script>addEventListener("load", () => {
      const root = document.documentElement, images = [...document.images];
      parent.postMessage(JSON.stringify({page: root.scrollWidth, window: root.clientWidth,
        images: images.length, broken: images.filter(i => !i.naturalWidth).length,
        wide: images.filter(i => i.getBoundingClientRect().right > root.clientWidth + 1).length}), "*");
    });</script>"""
    page = (finished / "report.html").read_text().replace("</head>", probe + "</head>")
    (tmp_path / "page.html").write_text(page)
    # A frame gives the page its width: the window of a headless browser cannot be made as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        "<!doctype html><title></title><script>addEventListener('message', e => { document.title = e.data })</script>"
        f'<iframe src="page.html" style="width:{width}px;height:3000px;border:0"></iframe>'
    )
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    title = re.search(r"<title>(.+?)</title>", shown)
    assert title, shown[:500]
    seen = json.loads(unescape(title.group(1)))
    assert seen["window"] == width
    assert seen["page"] <= width, "the page scrolls sideways"
    assert seen["images"] >= 3 and seen["broken"] == seen["wide"] == 0


def test_goes_on_after_an_interruption(finished: Path, tmp_path: Path) -> None:
    """Of three measurements one is gone and one cut in half: only those are done again, with equal numbers."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()
    (folder / "progress" / "fgsm.0of1.jsonl").unlink()
    cut = folder / "progress" / "pgd20.0of1.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:2]))
    untouched = (folder / "progress" / "steps_5@64.0of1.jsonl").stat().st_mtime_ns
    after = evaluate(config_from([*FLAGS, "--output_dir", str(folder)]), say=quiet)
    assert (folder / "progress" / "steps_5@64.0of1.jsonl").stat().st_mtime_ns == untouched
    before = Results.read(finished / "results.json")
    for name in before.accuracy:
        assert after.accuracy[name]["correct"] == before.accuracy[name]["correct"]


def test_two_processes_count_as_one(finished: Path, environment: Path, command: Command, tmp_path: Path) -> None:
    """Random starts belong to the image, so shards on two gloo processes give the same counts."""
    done = command("mimir_fast.evaluate", *FLAGS, "--output_dir", "out", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = Results.read(finished / "results.json"), Results.read(tmp_path / "out" / "results.json")
    assert two.choices["num_shards"] == 2
    for name in ("natural", "fgsm", "pgd20"):
        assert abs(one.accuracy[name]["correct"] - two.accuracy[name]["correct"]) <= 1, name
    # One process can finish what two began.
    (tmp_path / "out" / "progress" / "fgsm.1of2.jsonl").unlink()
    again = evaluate(config_from([*FLAGS, "--output_dir", str(tmp_path / "out")]), say=quiet)
    assert again.accuracy["fgsm"]["correct"] == two.accuracy["fgsm"]["correct"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eps", "8"], "8/255"),
        (["--limit", "0"], "no image to judge"),
        (["--data.source", "fashion_mnist", "--data.root", "/nowhere"], "/nowhere"),
        (["--corruptions", "/nowhere"], "zenodo"),
        (["--data.image_size", "9"], "--data.image_size"),
        (["--index_file", "missing.txt", "--data.limit", "3"], "missing.txt"),
    ],
)
def test_bad_input_is_explained(
    environment: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    """Through the same code as the command, without paying for a process each."""
    args = [*FLAGS, *flags]
    if flags[0] == "--index_file":
        at = args.index("--limit")
        del args[at : at + 2]
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        evaluate(config_from(args), say=quiet)
    assert words in str(error.value) + capsys.readouterr().err


def test_folder_of_another_evaluation_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"num_images: 40 -> 20.*--overwrite"):
        evaluate(config_from([*FLAGS, "--limit", "20", "--output_dir", str(finished)]), say=quiet)


def test_run_folder_brings_its_own_data(tmp_path: Path) -> None:
    saved = {"data": {"source": "cifar10", "image_size": 32, "crop_scale": [0.2, 1.0], "limit": 7}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = config_from(["--checkpoint", str(tmp_path), "--data.channels", "3"])
    assert (config.data.source, config.data.image_size, config.data.limit) == ("cifar10", 32, None)
    assert config.folder == tmp_path / "evaluation" / "quick"


def test_default_folders_and_eps_text() -> None:
    assert EvaluateConfig("timm:resnet18").folder == Path("runs/evaluation/timm_resnet18-quick")
    assert EvaluateConfig("a.pth", eps=4 / 255).eps_text == "4/255"
    assert EvaluateConfig("a.pth", eps=0.3).eps_text == "0.3"
