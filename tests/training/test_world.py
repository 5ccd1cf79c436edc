"""Two real ranks: results and failures are shared, stops are agreed on, saves and FSDP's gathering are collective."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import run_module

from mimir_fast import _native, world
from mimir_fast.pretrain import config_from
from mimir_fast.training.session import run_session
from mimir_fast.world import refuse_strangers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    script, folder = Path(__file__).with_name("ranks_world.py"), tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")]))
        out = run_module(script.parent, script.stem, str(folder), ranks=2, timeout=240)
    found = [json.loads(text.split("RESULT ", 1)[1]) for text in out.stdout.splitlines() if "RESULT " in text]
    assert len(found) == 2, out.stdout + out.stderr
    return sorted(found, key=lambda result: result["rank"])


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes; nobody starts the other."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(world, "_NOTICE", 0.2)
    monkeypatch.setattr(world, "_JOINING", timedelta(seconds=1))


@pytest.mark.usefixtures("lonely")
def test_a_process_whose_peers_do_not_come_says_so_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(world.RunFailed, match=r"not all came within 0:00:01.*or unset RANK and WORLD_SIZE"):
        world.start_world("cpu")
    assert "rank 0 waits at 127.0.0.1:" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("lonely")
def test_a_process_that_waits_for_its_peers_obeys_signals(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A handler of Python's would run when the wait is over."""
    monkeypatch.setattr(world, "_JOINING", timedelta(minutes=10))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stderr = os.fdopen(writing, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        signal.alarm(60)
        try:
            run_session(config_from(["--output_dir", "/nonexistent"]), lambda *_: pytest.fail("not reached"))
        finally:
            os._exit(1)
    assert b"waits at" in os.read(reading, 1000)
    os.kill(child, number)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number


def test_results_are_everybodys(ranks: list[dict[str, Any]]) -> None:
    assert [r["together"] for r in ranks] == [[0, 10]] * 2
    assert [r["on_main"] for r in ranks] == ["said by 0"] * 2


def test_failures_are_everybodys_and_name_where_they_happened(ranks: list[dict[str, Any]]) -> None:
    """Before, the others waited half an hour in a collective that rank 0 never came to."""
    assert ranks[0]["main fails"] == "FileExistsError: rank 0 cannot"
    assert ranks[1]["main fails"].startswith("FailedElsewhere: rank 0 (pid ")
    assert ranks[0]["the other fails"].startswith("FailedElsewhere: rank 1 (pid ")
    assert ranks[0]["the other fails"].endswith("failed: FileExistsError: rank 1 cannot")


def test_folders_that_hosts_do_not_share_are_refused_at_the_start(ranks: list[dict[str, Any]]) -> None:
    """Each would hold the half of every checkpoint, which nobody could load."""
    assert "Put --output_dir on storage that all hosts share" in ranks[1]["not shared"]
    assert "FailedElsewhere: rank 1" in ranks[0]["not shared"]


def test_ranks_with_other_options_do_not_train_together(ranks: list[dict[str, Any]]) -> None:
    """Each would follow its own learning rate, and a checkpoint be a mix. What is a host's own may differ."""
    for found in ranks:
        assert "--optim.lr is 0.001 on rank 0 (pid " in found["mixed"] and "and 0.005 on rank 1 (pid" in found["mixed"]
        assert not found["mixed folder"]


def test_a_signal_on_one_rank_stops_all_after_the_same_step(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["stopped at"] == ranks[1]["stopped at"] >= 3
    assert ranks[0]["asked"] < ranks[0]["stopped at"]  # not an all-reduce a step


def test_a_save_fails_for_all_or_for_none(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "could not write checkpoint" in found["poisoned save"]
        assert found["next save"] == "nothing" and found["files"] == 2
        assert found["loaded"] == [0.0, 1.0, 2.0, 3.0]


def test_running_statistics_are_the_mean_over_ranks(ranks: list[dict[str, Any]]) -> None:
    """Means 1, 2 and variances 2, 8 on rank 0, means 2, 4 and variances 8, 32 on rank 1, with momentum 0.1."""
    for found in ranks:
        means, variances = found["statistics"]
        assert means == pytest.approx([0.15, 0.3]) and variances == pytest.approx([0.9 + 0.5, 0.9 + 2.0])


def test_the_slowest_rank_is_what_is_logged(ranks: list[dict[str, Any]]) -> None:
    """Rank 0 alone said that nobody waited for data."""
    for found in ranks:
        values = found["meter"]
        assert values["loss"] == 7 and values["skipped_files"] == 3 and values["data_wait_rank"] == 1
        assert values["step_s"] >= 0.1 and values["images_per_s"] == pytest.approx(32 / values["step_s"])
        assert 0 < values["data_wait"] <= 0.5 and values["memory_gib"] > 0
    assert ranks[0]["meter"] == ranks[1]["meter"]


def test_fsdp_gathers_once_for_the_attack_and_the_training_forward(ranks: list[dict[str, Any]]) -> None:
    """Three blocks and a root: 4 all-gathers for the attack's six passes and the training forward, 3 for the blocks in
    the training backward. Resharding after each pass took about 3 · (4 + 3) + 7."""
    for found in ranks:
        assert found["fsdp"]["equal"] and found["fsdp"]["sharded"]
        assert found["fsdp"]["counts"] == {"_allgather_base_": 7, "_reduce_scatter_base_": 4}
        assert found["fsdp recomputed"]["equal"] and found["hsdp"]["equal"]
        assert "these do: 1, 2" in found["bad shards"]


def test_a_recorded_attack_refuses_shards(ranks: list[dict[str, Any]]) -> None:
    assert "use --strategy ddp, or leave it out" in ranks[0]["recorded shards"]


def test_a_penaltys_weight_is_everybodys(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["penalty share"] for found in ranks)
    assert first == second and first["ratio"] > 0 and 0.03 < first["realised"] < 0.3


def test_the_residual_stream_is_the_same_however_a_model_is_spread(ranks: list[dict[str, Any]]) -> None:
    """In bf16: patches are embedded in fp32, the encoder sums in fp32, the decoder in bf16."""
    fp32, bf16 = "torch.float32", "torch.bfloat16"
    wanted = {"embedded": [fp32], "residual": [f"{fp32} -> {fp32}"] * 2 + [f"{bf16} -> {bf16}"]}
    assert ranks[0]["dtypes"] == {"ddp": wanted, "fsdp": wanted}


def test_fused_paths_are_taken_however_a_model_is_spread(ranks: list[dict[str, Any]]) -> None:
    """A silent fall back to the single layers would pass every other test."""
    for found in ranks:
        bare = found["fused"]["bare"]
        assert bool(bare) == _native.has("fp32_gelu")
        assert found["fused"] == dict.fromkeys(("bare", "ddp", "fsdp"), bare)


def test_tasks_of_a_scheduler_that_form_no_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match=r"srun started 8 copies .* see launch/slurm.sbatch"):
        refuse_strangers()
    monkeypatch.setenv("WORLD_SIZE", "8")
    refuse_strangers()
