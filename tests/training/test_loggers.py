"""Loggers: what they write, and that none of them can end a run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import Command, command_environment, command_line

from mimir_fast.training.loggers import (
    JsonLines,
    Logger,
    Loggers,
    Pictures,
    TensorBoard,
    import_wandb,
    read_lines,
)
from mimir_fast.training.pictures import save_curves
from mimir_fast.training.terminal import LogFile, Terminal, duration


class TestJsonLines:
    def test_resuming_drops_what_came_after_the_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        logger = JsonLines(path, 0)
        for step in range(4):
            logger.scalars(step, {"loss": float(step)})
        logger.close()
        path.write_text(path.read_text() + '{"step": 4, "lo')  # killed in the middle of a line
        JsonLines(path, 2).close()
        assert [line["step"] for line in read_lines(path)] == [0, 1]

    @pytest.mark.parametrize("damage", [b"\xff\xfe", b'{"loss": 1.0}', b"[3]", b'"step"', b'{"step": "x"}'])
    def test_a_damaged_line_is_left_out(self, tmp_path: Path, damage: bytes) -> None:
        """It made every later end of the run a failure, or switched the log off."""
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(
            b'{"step": 0, "loss": 2.0}\n' + damage + b'\n{"step": 1, "loss": "?"}\n{"step": 2, "loss": 1}\n'
        )
        assert save_curves(path, tmp_path / "curves.png", ("loss",))
        JsonLines(path, 2).close()
        assert [line["step"] for line in read_lines(path)] == [0, 1]

    def test_nan_is_valid_json(self, tmp_path: Path) -> None:
        logger = JsonLines(tmp_path / "m.jsonl", 0)
        logger.scalars(0, {"loss": math.nan})
        logger.close()
        assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 0, "loss": None}

    def test_the_log_file_goes_on_and_says_what_ended_a_start(self, tmp_path: Path) -> None:
        path = tmp_path / "log.txt"
        for first in (0, 3):
            log = LogFile(path, 10, first)
            log.say("two\nlines")
            log.scalars(first, {"loss": 0.5, "eta_s": 9.0})
            log.ended(OSError("no space"))
            log.close()
        words = [line.split("  ", 1) for line in path.read_text().splitlines()]
        assert all(time.strptime(stamp, "%Y-%m-%d %H:%M:%S") for stamp, _ in words)
        step = "step {}/10  loss 0.5000  eta 9 s"
        said = [["two", "lines", step.format(n), "OSError: no space"] for n in (1, 4)]
        assert [text for _, text in words] == [*said[0], *said[1]]

    def test_durations(self) -> None:
        assert [duration(s) for s in (12, 185, 3720)] == ["12 s", "3 min 05 s", "1 h 02 min"]


class TestAFailingLogger:
    def test_is_switched_off_with_one_warning(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "pictures").write_text("a file where the folder should be")
        builders = {
            "the terminal": lambda: Terminal(10, 0),
            "pictures": lambda: Pictures(tmp_path / "pictures"),
            "metrics": lambda: JsonLines(tmp_path / "m.jsonl", 0),
        }
        loggers: Logger = Loggers(builders)  # type: ignore[arg-type]
        for step in range(3):
            loggers.picture(step, "grid", np.zeros((4, 4, 3), np.uint8))
            loggers.scalars(step, {"loss": 1.0})
        loggers.close()
        out = capsys.readouterr()
        assert (out.out + out.err).count("Pictures failed and is switched off (FileExistsError") == 2  # to both streams
        assert [line["step"] for line in read_lines(tmp_path / "m.jsonl")] == [0, 1, 2]

    def test_that_cannot_be_made_is_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        Loggers({"metrics.jsonl": lambda: JsonLines(tmp_path / "file" / "m.jsonl", 0)}).scalars(0, {"loss": 1.0})
        assert "metrics.jsonl failed and is switched off" in capsys.readouterr().err

    def test_a_reader_that_has_gone(self, tmp_path: Path) -> None:
        """`| head -1` closes the pipe: the run used to end with `Broken pipe`, nothing trained."""
        code = (
            "import sys; from pathlib import Path; from mimir_fast.training.loggers import *\n"
            "from mimir_fast.training.terminal import Terminal\n"
            "both = Loggers({'t': lambda: Terminal(500, 0), 'm': lambda: JsonLines(Path(sys.argv[1]), 0)})\n"
            "for step in range(500): both.scalars(step, {'loss': 1.0, 'text' + 'x' * 500: 1.0})\n"
            "both.close(); sys.exit(7)"
        )
        line = f'{sys.executable} -c "$CODE" {tmp_path / "m.jsonl"} | head -1; exit ${{PIPESTATUS[0]}}'
        environment = command_environment() | {"CODE": code}
        out = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
        assert out.returncode == 7 and "Traceback" not in out.stderr and "Exception ignored" not in out.stderr
        assert out.stderr.count("switched off (BrokenPipeError") == 1
        assert len(read_lines(tmp_path / "m.jsonl")) == 500


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path: Path, resumed_at: int) -> None:
    """Also of a start that was killed before its first one: its curve does not lie under the next."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, value in ((0, 6, 1.0), (resumed_at, 5, 2.0)):
        # tensorboard reads files in the order of their names: the second, then a counter of the process, 10 before 9.
        time.sleep(1.1 if value == 2.0 else 0)
        logger = TensorBoard(tmp_path, first)
        for step in range(first, last):
            logger.scalars(step, {"loss": value})
        logger.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(s, 1.0 if s < resumed_at else 2.0) for s in range(5)]


def test_weights_and_biases_is_an_extra() -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install .*\[wandb\]"):
            import_wandb()
    else:
        assert import_wandb()


class TestWeightsAndBiases:
    """With the package itself, on this machine only (WANDB_MODE=offline)."""

    SMALL = (
        "--recipe", "digits/mimir_vit_nano", "--data.limit", "64", "--batch_size", "16", "--max_steps", "12",
        "--log_every", "2", "--precision", "fp32", "--wandb", "mimir",
    )  # fmt: skip

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")

    def test_a_resumed_run_goes_on_in_its_page(self, command: Command, tmp_path: Path) -> None:
        for extra in (["--stop_after", "6"], []):
            out = command("mimir_fast.pretrain", *self.SMALL, "--output_dir", str(tmp_path / "run"), *extra)
            assert out.returncode == 0 and "switched off" not in out.stdout, out.stdout + out.stderr
        files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(files) == 2 and len({file.name for file in files}) == 1  # two starts of one run
        content = b"".join(file.read_bytes() for file in files)
        lines = read_lines(tmp_path / "run" / "metrics.jsonl")
        assert len(lines) == 7 and all(json.dumps(line["loss"]).encode() in content for line in lines)
        assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/*.png"))) == 1

    def test_its_end_is_not_the_runs(self, tmp_path: Path) -> None:
        """Its service is killed after some steps: one warning, and all steps are in metrics.jsonl."""
        run = tmp_path / "run"
        line = command_line("mimir_fast.pretrain", *self.SMALL, "--max_steps", "150", "--output_dir", str(run))
        with (tmp_path / "out.txt").open("w") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output, env=command_environment())
        while len(read_lines(run / "metrics.jsonl")) < 3:
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            time.sleep(0.02)
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        assert process.wait(120) == 0
        said = (tmp_path / "out.txt").read_text()
        assert "WeightsAndBiases failed and is switched off" in said and "done: 150 steps" in said
        assert len(read_lines(run / "metrics.jsonl")) == 76

    def test_without_a_key_the_run_goes_on(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "none")
        out = command("mimir_fast.pretrain", *self.SMALL, "--max_steps", "2", "--output_dir", str(tmp_path / "run"))
        assert out.returncode == 0, out.stdout + out.stderr
        assert "Weights & Biases failed and is switched off" in out.stdout
