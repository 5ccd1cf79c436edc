"""`python -m mimir_fast.evaluate` as a user runs it: report, resuming, two processes, all suites."""

import json
import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, run_module, start_module
from file_state import file_state
from safetensors.torch import load_file
from small_classifier import DIGITS, EPS, small_net, train_small

from mimir_fast.data.config import DataConfig
from mimir_fast.evaluate import config_from
from mimir_fast.evaluation import topics
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import load_images
from mimir_fast.evaluation.journal import read_journal
from mimir_fast.evaluation.measure import Measurement, clean, scored
from mimir_fast.evaluation.progress import TimeLeft
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.evaluation.topics import masking

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
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
        yield path


@pytest.fixture(scope="module")
def finished(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quick evaluation."""
    folder = tmp_path_factory.mktemp("quick")
    done = run_module(folder, "mimir_fast.evaluate", *FLAGS, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    *_, report, following = done.stdout.splitlines()
    assert report == "report: out/report.html" and "mimir_fast.compare out …" in following
    # Topics of many measurements have one line, the attacks of the headline one each.
    for line in (r"^ +pgd20 .* s$", r"^ +curve +\d+ measurements "):
        assert re.search(line, done.stdout, re.M), done.stdout
    assert "@few" not in done.stdout
    return folder / "out"


def test_results_hold_every_choice(finished: Path) -> None:
    results = Results.read(finished / "results.json")
    attacks = results.sections["accuracy"]["attacks"]
    assert results.clean["total"] == 40 == results.images["count"] == len(results.images["indices"])
    robust = attacks["pgd20"]
    assert 0 < robust["correct"] < results.clean["correct"]
    assert robust["parameters"] == {
        "eps": EPS, "alpha": EPS / 4, "num_steps": 20, "random_start": True, "loss": "ce", "restarts": 1, "seed": 0,
    }  # fmt: skip
    assert robust["largest"] <= EPS + 1e-6
    assert results.choices["eps_text"] == "40/255" and results.choices["preprocessing"]
    assert results.environment["packages"]["torch"] and "commit" in results.environment
    assert len(results.sections["masking"]["checks"]) == 7 and results.sections["curve"]["eps"][0] == 0
    assert "AutoAttack was not run" in results.verdicts["validity"]["text"]
    assert results.verdicts["validity"]["kind"] == "unsure", "without AutoAttack nothing is settled"


def test_the_headline_is_the_worst_case_of_each_image(finished: Path) -> None:
    """Counted anew from the journals: right when clean, and under everything within the ball. The checks and the curve
    ran on every image too, as there are no more than 64."""
    results = Results.read(finished / "results.json")
    standing: set[int] = set()
    inside = [
        *("natural", "fgsm", "pgd20", "check_fgsm", "check_random", "check_apgd50", "check_square"),
        *(f"steps_{k}" for k in (1, 2, 5, 10, 20)), "curve_20_255", "noise_20_255", "curve_40_255", "noise_40_255",
    ]  # fmt: skip
    journals = {path.name.split(".")[0].split("@")[0]: path for path in (finished / "progress").glob("*.jsonl")}
    for name in inside:
        rows = read_journal(journals[name]).values
        mine = {s for s, right in zip(rows["sample"], rows["correct"], strict=True) if right}
        standing = mine if name == "natural" else standing & mine
    broken = results.sections["accuracy"]["broken_by"]
    assert {int(s) for s, name in broken.items() if name == "none"} == standing
    assert results.robust["correct"] == len(standing) <= results.sections["accuracy"]["attacks"]["pgd20"]["correct"]
    clean = read_journal(journals["natural"]).values
    wrong = {s for s, right in zip(clean["sample"], clean["correct"], strict=True) if not right}
    assert wrong and {int(s) for s, name in broken.items() if name == "clean"} == wrong


def test_the_written_command_repeats_it(finished: Path) -> None:
    results = Results.read(finished / "results.json")
    words = shlex.split(results.command)[3:]
    again = config_from(words)
    assert asdict(again) == asdict(config_from([*FLAGS, "--output_dir", "out"]))
    assert results.rows["latex"].endswith(r"\\") and "small\\_net" in results.rows["latex"]
    assert len({line.count("|") for line in results.rows["markdown"].splitlines()}) == 1


def test_rendering_needs_the_results_alone(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page == render(Results.read(finished / "results.json"))
    embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.S)
    assert embedded and json.loads(embedded.group(1)) == json.loads((finished / "results.json").read_text())


def test_goes_on_after_an_interruption(finished: Path, tmp_path: Path) -> None:
    """Of three measurements one is gone and one cut in half: only those are done again, with equal numbers."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()
    (folder / "progress" / "fgsm.0of1.jsonl").unlink()
    cut = folder / "progress" / "pgd20.0of1.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:2]))
    untouched = (folder / "progress" / "steps_5@few-40.0of1.jsonl").stat().st_mtime_ns
    after = evaluate(config_from([*FLAGS, "--output_dir", str(folder)]), log=quiet)
    assert (folder / "progress" / "steps_5@few-40.0of1.jsonl").stat().st_mtime_ns == untouched
    assert without_times(after.as_dict()) == without_times(Results.read(finished / "results.json").as_dict())


def without_times(value: Any) -> Any:
    """Results but for seconds and for where they were written."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "output_dir", "command")}
    return [without_times(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_killed_again_and_again_it_ends_with_the_same_numbers(
    finished: Path, environment: Path, tmp_path: Path
) -> None:
    """`kill -9` at moments of its own choosing; the last start finishes what the others began."""
    for delay in (0.5, 1.5, 2.5):
        with suppress(TimeoutError):
            start_module(tmp_path, "mimir_fast.evaluate", *FLAGS, "--output_dir", "out").wait(delay)
    after = evaluate(config_from([*FLAGS, "--output_dir", str(tmp_path / "out")]), log=quiet)
    assert without_times(after.as_dict()) == without_times(Results.read(finished / "results.json").as_dict())


def test_two_processes_count_as_one(finished: Path, environment: Path, command: Command, tmp_path: Path) -> None:
    """Random starts belong to the image, so shards on two gloo processes give the same counts."""
    done = command("mimir_fast.evaluate", *FLAGS, "--output_dir", "out", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = Results.read(finished / "results.json"), Results.read(tmp_path / "out" / "results.json")
    assert two.choices["num_shards"] == 2
    broken = [r.sections["accuracy"]["broken_by"] for r in (one, two)]
    assert sum(broken[0][s] != broken[1][s] for s in broken[0]) <= 1, "but for Square, whose draws are a batch's"
    assert one.images == two.images
    # One process can finish what two began.
    (tmp_path / "out" / "progress" / "fgsm.1of2.jsonl").unlink()
    again = evaluate(config_from([*FLAGS, "--output_dir", str(tmp_path / "out")]), log=quiet)
    assert without_times(again.sections) == without_times(two.sections)


@pytest.mark.slow
def test_paper_suite_end_to_end(environment: Path, command: Command, tmp_path: Path) -> None:
    """AutoAttack, PGD-100, the adaptive attacks; AutoAttack's accuracy is a direct call's, image by image."""
    pyautoattack = pytest.importorskip("pyautoattack")
    flags = [*FLAGS[:-4], "--limit", "10", "--batch_size", "10", "--suite", "paper", "--autoattack_exact",
             "--output_dir", "out"]  # fmt: skip
    done = command("mimir_fast.evaluate", *flags)
    assert done.returncode == 0, done.stderr
    results = Results.read(tmp_path / "out" / "results.json")
    assert set(results.sections["accuracy"]["attacks"]) == {
        "natural", "fgsm", "pgd20", "pgd100", "pgd_mi100", "pgd_fea100"
    }  # fmt: skip
    found = results.sections["autoattack"]
    assert found["whole"] and found["title"] == "AutoAttack" and found["total"] == 10
    model, images = small_net(), load_images(DIGITS, np.array(results.images["indices"]))
    with torch.random.fork_rng([]):
        direct = pyautoattack.AutoAttack(model, eps=EPS, version="standard", seed=0)
        x_adv, _ = direct.run_standard_evaluation(images.images.float() / 255, images.labels, batch_size=10)
    with torch.no_grad():
        stands = (model(x_adv).argmax(1) == images.labels).tolist()
    rows = read_journal(tmp_path / "out" / "progress" / "autoattack.0of1.jsonl").values
    assert [bool(right) for right in rows["correct"]] == stands
    assert found["correct"] == sum(stands) >= results.robust["correct"]
    assert len(results.sections["masking"]["checks"]) == 8
    assert results.verdicts["validity"]["text"].endswith("AutoAttack ran on every image.")


def test_full_suite_end_to_end(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything there is, on few images, with a masked autoencoder, a second model, and other test sets."""
    monkeypatch.setitem(masking.QUERIES, "full", 300)  # of 5,000, which take half of the time
    monkeypatch.chdir(tmp_path)
    from PIL import Image
    from safetensors.torch import save_file

    from mimir_fast.models.masked_model import ModelConfig, build_masked_model

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        autoencoder = build_masked_model(ModelConfig(encoder="nano", patch_size=2), 8, 1)
    save_file(dict(file_state(autoencoder)), tmp_path / "mae.safetensors")
    digits = load_images(DIGITS, np.arange(40))
    for number in range(40):  # other test set: the classes 1 and 7 only
        label = int(digits.labels[number])
        if label in (1, 7):
            (tmp_path / "shifted" / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[number, 0].numpy()).save(tmp_path / "shifted" / str(label) / f"{number}.png")
    flags = [
        *FLAGS[:-4], "--limit", "6", "--batch_size", "6", "--suite", "full", "--output_dir", "out",
        "--autoattack_images", "3", "--pretrained", "mae.safetensors", "--shifts", "shifted", "--targets", "2",
        "--restarts", "2", "--transfer_from", "small_classifier:small_net", "--save_adversarial", "--mi_balanced",
        "--autoattack_attacks", "apgd-ce", "fab-t", "--minimal", "3", "--smoothing", "0.1", "--smoothing_images", "2",
        "--smoothing_draws", "50", "--strongest", "yes", "--strongest_attacks", "pgd-margin",
    ]  # fmt: skip
    evaluate(config_from(flags), log=quiet)
    results = Results.read(tmp_path / "out" / "results.json")
    assert set(results.sections) == {path.stem for path in Path(topics.__file__).parent.glob("[a-z]*.py")}
    assert any("Common corruptions were left out" in note for note in results.notes)
    shifted = results.sections["shifts"]["shifted"]
    assert shifted["classes"] == 2 and shifted["accuracy"] > 0.8 and shifted["total"] >= 4
    points = results.sections["information"]["points"]
    assert all({"lower", "upper", "crossed", "renyi_bits"} <= set(point) for point in points)
    surfaces = results.sections["surface"]
    assert set(surfaces) == {"surface_inputs", "surface_clean", "surface_attacked"}
    assert np.array(surfaces["surface_inputs"]["loss"]).shape == (15, 15)
    own = results.sections["transfer"]["small_classifier:small_net"]
    assert own["accuracy"] == own["source_accuracy"], "attacked on itself it falls as itself"
    assert "On 3 of the 6" in (tmp_path / "out" / "report.html").read_text()
    kept = load_file(next((tmp_path / "out" / "adversarial" / "pgd20").iterdir()))
    images = load_images(DIGITS, np.array(results.images["indices"])).images.float() / 255
    assert (kept["images"] - images).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        assert torch.equal(small_net()(kept["images"]).argmax(1), kept["predictions"])
    right = int((kept["predictions"] == kept["labels"]).sum())
    assert right == results.sections["accuracy"]["attacks"]["pgd20"]["correct"]


@pytest.mark.parametrize(("norm", "eps"), [("l2", "0.6"), pytest.param("l1", "1.5", marks=pytest.mark.slow)])
def test_other_norms_end_to_end(environment: Path, tmp_path: Path, norm: str, eps: str) -> None:
    flags = [*FLAGS, "--norm", norm, "--limit", "20", "--output_dir", str(tmp_path / "out")]
    flags[flags.index("--eps") + 1] = eps
    results = evaluate(config_from(flags), log=quiet)
    entry = results.sections["accuracy"]["attacks"]["pgd20"]
    assert 0 < entry["correct"] < results.clean["correct"] and entry["largest"] <= float(eps) * (1 + 1e-6)
    assert results.sections["curve"]["accuracy"][-1] < 0.2, "at the largest radius nothing is out of reach"
    assert f"ε = {eps}" in results.verdicts["robustness"]["text"]
    with pytest.raises(ValueError, match=r"--norm l2 needs a radius of its own.*0\.5"):
        EvaluateConfig("a.pth", norm="l2")


@pytest.mark.slow
def test_unreadable_files_of_all_shards_reach_the_record(environment: Path, command: Command, tmp_path: Path) -> None:
    from PIL import Image

    digits = load_images(DIGITS, np.arange(60))
    for number in range(60):
        folder = tmp_path / "data" / "val" / str(int(digits.labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[number, 0].numpy()).save(folder / f"{number:03d}.png")
    bad = sorted((tmp_path / "data" / "val").rglob("*.png"))[10:12]  # neighbours: one in each of two shards
    for path in bad:
        path.write_bytes(b"no image")
    flags = [
        "--checkpoint", "small_classifier:small_net", "--data.source", "folder", "--data.root", "data",
        "--suite", "table", "--data.image_size", "8", "--data.channels", "1", "--eps", "40/255", "--autoattack", "no",
        "--output_dir", "out",
    ]  # fmt: skip
    done = command("mimir_fast.evaluate", *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    results = Results.read(tmp_path / "out" / "results.json")
    assert {Path(path).name for path in results.images["skipped"]} == {path.name for path in bad}
    assert results.images["count"] == 58 == results.clean["total"]
    assert any("2 unreadable files" in note for note in results.notes)


def test_a_model_no_better_than_guessing_is_said(environment: Path, tmp_path: Path) -> None:
    """Its normalisation is wrong, all images look the same to it: it names one class, whichever that is."""
    flags = [*FLAGS, "--suite", "table", "--autoattack", "no", "--mean", "1", "--std", "100000", "--output_dir",
             str(tmp_path / "out")]  # fmt: skip
    results = evaluate(config_from(flags), log=quiet)
    assert results.clean["accuracy"] < 0.3
    assert any("guessing gives 10.0 %" in note for note in results.notes)
    assert results.verdicts["robustness"]["kind"] != "good"


def test_time_left_is_that_of_the_slowest_process(tmp_path: Path) -> None:
    items = [Measurement("a", scored(clean), cost=2.0), Measurement("b", scored(clean), images="few:4", cost=8.0)]
    seconds = 0.0
    clock = TimeLeft(tmp_path, items, 16, 1, 0, 1, now=lambda: seconds)
    tick = clock.ticker(items[0], 16, quiet)
    seconds = 8.0
    tick(8)
    assert clock.own() == (pytest.approx(0.25), pytest.approx(24))
    tick(16)
    clock.finished()
    clock.ticker(items[1], 4, quiet)
    clock.finished()  # found finished on disk: no work of this start, and nothing left
    assert clock.own() == (pytest.approx(1.0), 0.0)
    two = TimeLeft(tmp_path, items, 16, 2, 0, 2)
    (tmp_path / "time.1of2.json").write_text("[0.5, 7200]")
    two.ticker(items[0], 8, quiet)(8)
    assert "2.0 h left" in two.words()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eps", "8"], "8/255"),
        (["--limit", "0"], "no image to evaluate"),
        (["--data.source", "fashion_mnist", "--data.root", "/nowhere"], "/nowhere"),
        (["--corruptions", "/nowhere"], "zenodo"),
        (["--shifts", "/nowhere"], "/nowhere"),
        (["--autoattack_attacks", "apgd"], "apgd-ce"),
        (["--mean", "0.5"], "--std"),
        (["--crop", "1.5"], "0.875"),
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
        evaluate(config_from(args), log=quiet)
    assert words in " ".join(f"{error.value} {capsys.readouterr().err}".split()), "the parser breaks lines"


def test_folder_of_another_evaluation_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"num_images: 40 -> 20.*--overwrite"):
        evaluate(config_from([*FLAGS, "--limit", "20", "--output_dir", str(finished)]), log=quiet)


def test_run_folder_brings_its_own_data(tmp_path: Path) -> None:
    saved = {
        "data": {"source": "cifar10", "image_size": 32, "crop_scale": [0.2, 1.0], "limit": 7},
        "model": {},
        "run": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = config_from(["--checkpoint", str(tmp_path), "--data.channels", "3"])
    assert (config.data.source, config.data.image_size, config.data.limit) == ("cifar10", 32, None)
    assert config.folder == tmp_path / "evaluation" / "quick-linf-8_255"


@pytest.mark.parametrize("content", ["[1, 2]", '{"data": "text"}', '{"data": null}', "no JSON {", "3"])
def test_somebody_elses_config_beside_a_file_says_nothing_of_the_data(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert config_from(["--checkpoint", str(tmp_path / "weights.pth")]).data == DataConfig()


def test_default_folders_and_eps_text() -> None:
    assert EvaluateConfig("timm:resnet18").folder == Path("runs/evaluation/timm_resnet18/quick-linf-8_255")
    assert EvaluateConfig("a.pth", eps=4 / 255).eps_text == "4/255"
    assert EvaluateConfig("a.pth", eps=0.5 / 255).eps_text == "0.5/255"
    assert EvaluateConfig("a.pth", eps=0.3 / 255).eps_text == "0.3/255"
    assert EvaluateConfig("a.pth", eps=2.25 / 255).eps_text == "2.25/255"
    assert EvaluateConfig("a.pth", eps=0.3).eps_text == "0.3"
