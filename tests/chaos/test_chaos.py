"""The chaos suite: a short part always, the long one by `-m slow`. A failure prints the seed that repeats it."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import faults
from chaos.campaign import Campaign
from chaos.runs import PATIENCE, Runs
from chaos.scenarios import SCENARIOS
from chaos.zygote import Zygote

root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and namespaces need root")
strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("chaos")
    zygote = Zygote(folder)
    yield Runs(folder, zygote)
    zygote.close()


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["kill", "flip_bits"], id="killed, then damaged"),
        pytest.param(["kill_in_syscall"], id="killed in a system call", marks=strace),
        pytest.param(["ask_to_stop", "cut_config", "start_twice"], id="asked to stop, started twice"),
        pytest.param(["close_the_pipe"], id="nobody reads"),
    ],
)
def test_same_bits_as_the_undisturbed_run(runs: Runs, tmp_path: Path, names: list[str]) -> None:
    rng, run = random.Random(7), tmp_path / "run"
    for name in names:
        if name in ("flip_bits", "cut_config"):
            if len(list((run / "checkpoints").glob("step-*"))) > 1:
                getattr(faults, name)(run, rng)
        else:
            getattr(faults, name)(runs, run, rng)
    process = runs.start(run)
    assert process.wait(PATIENCE) == 0, process.said()
    runs.check_same(run)


@pytest.mark.slow
def test_many_faults(runs: Runs) -> None:
    campaign = Campaign(runs.folder, runs.zygote)
    for seed in range(100, 130):
        campaign.chain(seed)
    assert not campaign.failures, "\n".join(campaign.failures)
    assert sum(campaign.counts.values()) >= 100


@root
@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios(runs: Runs, name: str) -> None:
    assert SCENARIOS[name](runs, runs.folder / name, random.Random(1))
