"""What is registered from outside the package, through the command line: `--import mine`, and what runs remember."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import run_module

from mimir_fast import extensions
from mimir_fast.extensions import load_extensions, saved_imports

MINE = Path(__file__).with_name("outside_package.py")
MODEL = ["--model.family", "gated", "--model.encoder", "mini", "--model.patch_size", "8"]
SHORT = ["--data.source", "stripes", "--max_steps", "2", "--batch_size", "16", "--device", "cpu"]
PRETRAIN = ["--method", "half_mae", "--share", "0.25", *MODEL, *SHORT, "--output_dir", "pre"]
FINETUNE = ["--init", "pre", "--method", "warm", "--temperature", "3", *MODEL, *SHORT, "--output_dir", "fine",
            "--probe.num_images", "8", "--probe.num_steps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the module and a run that was pre-trained with it."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copy(MINE, folder / "mine.py")
    out = run_module(folder, "mimir_fast.pretrain", "--import", "mine", *PRETRAIN)
    assert out.returncode == 0, out.stderr
    assert "half_mae on stripes (64 images, 32²): Gated-mini/8" in out.stdout
    assert json.loads((folder / "pre" / "config.json").read_text())["imports"] == ["mine"]
    return folder


def test_a_run_is_fine_tuned_and_evaluated_without_being_told_again(folder: Path) -> None:
    out = run_module(folder, "mimir_fast.finetune", *FINETUNE)
    assert out.returncode == 0, out.stderr
    assert "warm on stripes" in out.stdout and "Gated-mini/8, temperature 3" in out.stdout
    assert json.loads((folder / "fine" / "config.json").read_text())["imports"] == ["mine"]
    line = ["--checkpoint", "fine/checkpoints/step-00000002", "--suite", "table", "--autoattack", "no", "--limit", "8"]
    out = run_module(folder, "mimir_fast.evaluate", *line, "--device", "cpu")
    assert out.returncode == 0 and "8 images of stripes" in out.stdout, out.stderr


def test_a_run_goes_on_without_being_told_again(folder: Path) -> None:
    out = run_module(folder, "mimir_fast.pretrain", *PRETRAIN)
    assert out.returncode == 0 and "resumed at step 2 of 2" in out.stdout, out.stderr


def test_help_shows_what_was_registered(folder: Path) -> None:
    out = run_module(folder, "mimir_fast.finetune", "--import=mine", "--method=warm", "--help_all")
    assert "trades,warm}" in out.stdout.replace("\n", "") and "--temperature FLOAT" in out.stdout


def test_a_module_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pre", tmp_path / "pre")
    out = run_module(tmp_path, "mimir_fast.finetune", "--init", "pre")
    assert out.returncode == 2 and out.stderr.startswith("error: pre was trained with module 'mine', which cannot be")
    assert "start the command in the module's folder, or put that folder into PYTHONPATH" in out.stderr


@pytest.mark.slow
def test_every_rank_imports_it(folder: Path) -> None:
    line = [*PRETRAIN[:-1], "two", "--import", "mine"]
    out = run_module(folder, "mimir_fast.pretrain", *line, ranks=2)
    assert out.returncode == 0 and "2 x cpu" in out.stdout, out.stderr


def test_names_come_from_the_line_and_from_the_runs_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(extensions, "import_extension", lambda name, run: asked.append((name, run)))
    for run, names in (("a", ["x"]), ("b", ["y", "x"])):
        (tmp_path / run / "checkpoints" / "step-00000001").mkdir(parents=True)
        (tmp_path / run / "config.json").write_text(json.dumps({"imports": names}))
    line = ["--import", "z", "--init=a", "--transfer_from", "other", "b/checkpoints/step-00000001", "--import=x"]
    assert load_extensions(line, "runs/none") == ("x", "y", "z")
    assert asked == [("x", ""), ("y", "b/checkpoints/step-00000001"), ("z", "")]
    (tmp_path / "config.json").write_text('{"imports": "os"}')  # another program's
    assert saved_imports("a") == ("x",) and saved_imports(".") == saved_imports("nowhere") == saved_imports("") == ()


@pytest.mark.parametrize(("name", "package"), [("stolen", True), ("stolen.inner", True), ("stolen.inner", False)])
def test_a_run_brings_no_code_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: bool) -> None:
    """Python imports any folder as a package: the run's own would be one that its config.json can name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "stolen" / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"imports": [name]}))
    code = "import pathlib; pathlib.Path('ran').touch()"
    for file in ("__init__.py", "inner.py") if package else ("inner.py",):
        (tmp_path / "stolen" / file).write_text(code)
    with pytest.raises(ImportError, match=f"stolen/run asks for module '{name}', which came with it: --import"):
        load_extensions(["--checkpoint", "stolen/run"])
    assert not (tmp_path / "ran").exists()
    assert load_extensions(["--checkpoint", "stolen/run", "--import", name]) == (name,) and (tmp_path / "ran").exists()
    for module in ("stolen", "stolen.inner"):
        sys.modules.pop(module, None)


def test_a_bad_name_is_refused() -> None:
    for name in ("a/b.py", "mine.py/", ""):
        with pytest.raises(ValueError, match="wanted the name of a module"):
            load_extensions([f"--import={name}"])
    with pytest.raises(ImportError, match=r"--import not_there: No module named 'not_there'; looked for in"):
        load_extensions(["--import", "not_there"])
