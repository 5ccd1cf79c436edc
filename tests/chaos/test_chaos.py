"""The chaos suite: a short part always, the long one by `-m slow`. A failure prints the seed that repeats it."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from chaos import faults
from chaos.campaign import play, read, story_of, write
from chaos.every_call import Save
from chaos.runs import PRETRAIN, Runs
from chaos.scenarios import SCENARIOS
from commands import zygote

root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and namespaces need root")
strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("chaos"), zygote())


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["kill", "ask_to_stop"], id="killed, damaged, asked to stop"),
        pytest.param(["kill_in_syscall"], id="killed in a system call", marks=[strace, pytest.mark.slow]),
        pytest.param(["start_twice", "close_the_pipe"], id="started twice, nobody reads"),
    ],
)
def test_same_bits_as_the_undisturbed_run(runs: Runs, tmp_path: Path, names: list[str]) -> None:
    rng, run = random.Random(7), tmp_path / "run"
    for name in names:
        getattr(faults, name)(runs, run, PRETRAIN, rng)
        faults.damage(run, rng)
    runs.finish(run)
    runs.check_same(run)


@root
@strace
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4 * len(SCENARIOS)), ids=lambda seed: f"{seed} {story_of(seed)}")
def test_every_story(runs: Runs, seed: int) -> None:
    result = play(seed, runs)
    assert not result["failure"], result["failure"]
    assert result["survived"]


@strace
@pytest.mark.slow
def test_a_save_killed_at_any_of_its_system_calls(runs: Runs) -> None:
    """Some of them; `every_call.py` has all."""
    save = Save(runs)
    calls = save.calls()
    for name in ("mkdir", "fsync", "rename", "unlinkat", "rmdir", "symlink"):
        assert save.killed_at(name, calls[name], full=name == "rename"), (name, calls)


def test_a_campaign_goes_on_where_it_was_and_writes_its_table(tmp_path: Path) -> None:
    """The last result of a seed counts: a failure that was repaired and repeated is no failure any more."""
    where = {"seconds": 60.0, "commit": "abc", "machine": "here", "torch": "2"}
    lines = [
        {"seed": 0, "story": "pretrain", "survived": {"kill": 3}, "failure": None, **where},
        {"seed": 1, "story": "ddp", "survived": {}, "failure": "lost", **where},
        {"seed": 1, "story": "ddp", "survived": {"kill": 2, "cut": 1}, "failure": None, **where},
    ]
    record, page = tmp_path / "record.jsonl", tmp_path / "page.md"
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text("before\n<!-- campaign -->\nold\n<!-- end -->\nafter\n")
    write(page, read(record))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| kill | 5 |" in text and "**6**" in text and "failures: none" in text
