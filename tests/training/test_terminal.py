"""The line at the bottom of a terminal, in a real pseudo-terminal of several widths."""

from pathlib import Path

import pytest
import torch
from rich import get_console
from terminal_screen import run_in_terminal

from mimir_fast.pretrain import config_from
from mimir_fast.training.pretraining import pretrain
from mimir_fast.training.terminal import ProgressLine, Terminal

# As MIMIR's loop logs them: the method's scalars, then speed, waiting, memory, rate, epoch.
VALUES = {
    "reconstruction": 0.9519, "mi": 8e-7, "loss": 0.9520, "images_per_s": 624.0, "data_wait": 0.001,
    "memory_gib": 0.84, "lr": 1.2e-3, "epoch": 10.3, "eta_s": 72.0,
}  # fmt: skip


def line(columns: int, total: int = 468, done: int = 120) -> str:
    progress = ProgressLine(total, 0)
    progress.take(done - 1, VALUES)
    return progress.text(columns).plain


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (60, "step 120/468 ━━━━━───────────── 1 min 12 s left  loss 0.9520"),
        (80, "step 120/468 ━━━━━━────────────────── 1 min 12 s left  loss 0.9520"),
        (130, "step 120/468 ━━━━━━────────────────── 1 min 12 s left  loss 0.9520  reconstruction 0.9519  mi 8.00e-07  "
              "624 images/s"),
    ],
)  # fmt: skip
def test_the_most_important_comes_first(columns: int, wanted: str) -> None:
    assert line(columns) == wanted and len(wanted) <= columns


def test_long_runs_in_narrow_terminals() -> None:
    for columns in range(30, 200):
        said = line(columns, total=1_251_200, done=1_000_000)
        assert len(said) <= max(columns, 53) and said.startswith("step 1000000/1251200 ")
        assert said.split("  ")[1] == "loss 0.9520"
        assert all(part in line(300, 1_251_200, 1_000_000).split("  ") for part in said.split("  ")[2:])


@pytest.mark.parametrize("columns", [60, 80, 130])
def test_on_the_screen(columns: int) -> None:
    get_console().print("")  # rich's common console, as it is where there is no terminal

    def live() -> Terminal:
        terminal = Terminal(468, 0)
        terminal.say("what a run says first, in more than sixty columns so that it goes on in the next line")
        terminal.scalars(119, VALUES)
        terminal.evaluated(119, {"natural": 0.97, "score": 0.5})
        terminal.scalars(139, VALUES)
        return terminal

    def to_the_end() -> None:
        terminal = live()
        terminal.scalars(467, VALUES)
        terminal.say("next: a command")
        terminal.close()

    rows = [row for row in run_in_terminal(columns, live) if row]
    assert rows[-2:] == ["step 120/468  natural 0.9700  score 0.5000", line(columns, done=140)]
    assert "".join(rows[:-2]).startswith("what a run says first") and len(rows) == 3 + (columns < 85)
    assert [row for row in run_in_terminal(columns, to_the_end) if row][-1] == "next: a command"


def test_a_run_ends_with_the_command_to_type(tmp_path: Path) -> None:
    """The whole command; its last line used to stand above a stale bar."""

    def train() -> None:
        torch.set_num_threads(1)
        config = config_from([
            "--recipe", "digits/mimir_vit_nano", "--data.limit", "32", "--batch_size", "16", "--max_steps", "3",
            "--device", "cpu", "--precision", "fp32", "--log_every", "2", "--output_dir", str(tmp_path / "run"),
        ])  # fmt: skip
        pretrain(config, ["mimir_fast.finetune", "--init", "a run"])

    rows = [row for row in run_in_terminal(80, train) if row]
    said = "\n".join(rows)
    assert "done: 3 steps" in said and "mimir_fast.finetune --init 'a run'" in "".join(rows[-3:]), said
    assert not [row for row in rows if row.startswith("step ")], said
