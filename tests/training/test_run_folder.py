"""A run's folder: one start at a time, nothing deleted that must stay, and a whole checkpoint to go on from."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import start_code
from run_folders import contents, looked, names, opened, save
from zygote import Process

from mimir_fast.checkpoints.reading import checkpoints_of, read_meta
from mimir_fast.pretrain import config_from
from mimir_fast.training.health import TrainingDiverged
from mimir_fast.training.lock import FolderInUse, Lock
from mimir_fast.training.pretraining import pretrain
from mimir_fast.training.run_folder import differences

pytestmark = pytest.mark.usefixtures("no_scheduler")


class TestOpening:
    def test_what_only_moves_or_speeds_a_run_is_free_to_change(self) -> None:
        old = {"run": {"device": "cpu", "seed": 0}, "model": {"encoder": "tiny"}}
        assert differences(old, {"run": {"device": "cuda", "seed": 0}, "model": {"encoder": "tiny"}}) == []
        assert differences(old, {"run": {"device": "cpu", "seed": 1}, "model": {"encoder": "tiny"}}) == [
            "run.seed: 0 -> 1"
        ]

    def test_a_run_of_an_older_version_goes_on_without_the_options_it_did_not_have(self, tmp_path: Path) -> None:
        opened(tmp_path).close()
        recorded = json.loads((tmp_path / "config.json").read_text())
        assert recorded["objective"].pop("decode_ratio") == 1.0
        (tmp_path / "config.json").write_text(json.dumps(recorded))
        save(tmp_path, 1)
        with pytest.raises(FileExistsError, match=r"objective.decode_ratio: 1.0 -> 0.5"):
            opened(tmp_path, "--decode_ratio", "0.5")
        opened(tmp_path).close()

    def test_only_a_run_with_a_checkpoint_is_guarded(self, tmp_path: Path) -> None:
        """A start that failed early (a typo in --data.root, say) does not stand in the way of the next."""
        opened(tmp_path, "--seed", "1").close()
        opened(tmp_path, "--seed", "2").close()
        save(tmp_path, 1)
        with pytest.raises(FileExistsError, match=r"run.seed: 2 -> 3"):
            opened(tmp_path, "--seed", "3")
        with pytest.raises(FileExistsError, match="--overwrite to start anew"):
            opened(tmp_path, "--seed", "2", resume=False)

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        "files",
        [
            {"thesis.tex": "mine"},
            {"config.json": '{"architectures": ["ViTForImageClassification"], "hidden_size": 768}', "model.bin": "x"},
            {"config.json": '{"run": {"name": "another program\'s"}, "model": {}}'},
            {"config.json": "no json at all"},
            {"checkpoints/step-00000001/weights.pt": "another program's", "metrics.jsonl": "{}"},
            {"environment.json": "{}"},
            {"download.partial": "a browser's"},
        ],
        ids=lambda files: "+".join(files),
    )
    def test_a_strangers_folder_is_left_alone(self, tmp_path: Path, files: dict[str, str], overwrite: bool) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        with pytest.raises(FileExistsError, match="no run of ours"):
            opened(tmp_path, overwrite=overwrite, allow_changes=True)
        assert contents(tmp_path) == files

    def test_a_folder_of_the_hub_is_no_run(self, tmp_path: Path) -> None:
        """Its config.json has the keys of a run's, without those that speak of a machine."""
        from mimir_fast.hub_config import public_config

        opened(tmp_path / "run").close()
        recorded = json.loads((tmp_path / "run" / "config.json").read_text())
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "config.json").write_text(json.dumps(public_config(recorded)))
        with pytest.raises(FileExistsError, match=r"no run of ours \(config.json\)"):
            opened(tmp_path / "hub", overwrite=True)

    def test_a_look_that_never_began_leaves_nothing(self, tmp_path: Path) -> None:
        folder = looked(tmp_path / "runs" / "a")
        assert (tmp_path / "runs" / "a" / ".lock").exists()
        folder.close()
        assert not list(tmp_path.iterdir())
        (tmp_path / "there").mkdir()
        looked(tmp_path / "there").close()
        assert not list((tmp_path / "there").iterdir())

    @pytest.mark.parametrize("locks", [True, False])
    def test_storage_that_cannot_seek_is_refused_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
    ) -> None:
        """It was said after eight steps, with the advice to free some space; nothing may stay behind."""

        def illegal(*args: Any) -> None:
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

        monkeypatch.setattr(os, "pwrite", illegal)
        if not locks:  # such a mount may not open for writing what is there
            monkeypatch.setattr(Lock, "_is_the_file", illegal)
        with pytest.raises(OSError, match=r"cannot seek in a file that it writes .*--vfs-cache-mode writes"):
            looked(tmp_path / "runs" / "a")
        assert not list(tmp_path.iterdir())

    def test_a_run_of_a_version_without_the_mark_is_known_by_its_keys(self, tmp_path: Path) -> None:
        opened(tmp_path).close()
        recorded = json.loads((tmp_path / "config.json").read_text())
        assert recorded.pop("format") == "mimir_fast.run"
        (tmp_path / "config.json").write_text(json.dumps(recorded))
        save(tmp_path, 1)
        opened(tmp_path).close()
        opened(tmp_path, "--seed", "1", overwrite=True).close()

    @pytest.mark.parametrize("cut", [0, 1, 100])
    def test_a_cut_config_is_restored_from_the_checkpoint(self, tmp_path: Path, cut: int) -> None:
        """Written in place, a kill left 0 bytes: `error: Expecting value: line 1 column 1 (char 0)`."""
        opened(tmp_path, "--seed", "5").close()
        save(tmp_path, 1)
        recorded = tmp_path / "config.json"
        recorded.write_text(recorded.read_text()[:cut])
        with pytest.raises(FileExistsError, match=r"run.seed: 5 -> 6"):  # it is still known what it was
            opened(tmp_path, "--seed", "6")
        folder = opened(tmp_path, "--seed", "5")
        assert any("config.json was damaged; restored from step-00000001" in note for note in folder.notes)
        assert json.loads(recorded.read_text())["run"]["seed"] == 5

    def test_a_cut_config_before_the_first_checkpoint(self, tmp_path: Path) -> None:
        """Nothing of ours can be read any more: the folder is known by names alone, and by nothing else beside them."""
        opened(tmp_path).close()
        (tmp_path / "config.json").write_text('{"run"')
        (tmp_path / "checkpoints" / "step-00000001.partial").mkdir(parents=True)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(FileExistsError, match=r"is no run of ours \(.*model\.safetensors"):
            opened(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        opened(tmp_path).close()
        assert json.loads((tmp_path / "config.json").read_text())["format"] == "mimir_fast.run"

    def test_leftovers_of_a_kill_go(self, tmp_path: Path) -> None:
        opened(tmp_path).close()
        save(tmp_path, 1)
        (tmp_path / "checkpoints" / "step-00000002.partial").mkdir()
        (tmp_path / "config.json.partial").write_text("{")
        (tmp_path / ".seen-0").touch()
        (tmp_path / ".trial-0").mkdir()
        (tmp_path / ".trial-1.old.partial").mkdir()
        opened(tmp_path)
        assert names(tmp_path) == ["step-00000001"]
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "checkpoints", "config.json", "environment.json"}


HOLD = """
import sys, time, torch
from pathlib import Path
from mimir_fast.pretrain import config_from
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.world import World
folder = RunFolder(Path(sys.argv[1]), World(0, 1, torch.device("cpu")))
folder.open(config_from([]), resume=True, overwrite=False, allow_changes=False)
folder.begin()
print("held", flush=True)
time.sleep(120)
"""


class TestLock:
    def hold(self, folder: Path, run: Path, **variables: str) -> Process:
        process = start_code(folder, HOLD, str(run), **variables)
        while "held\n" not in process.said():
            assert process.poll() is None, process.said()
            time.sleep(0.02)
        return process

    def test_two_starts_on_one_folder(self, tmp_path: Path) -> None:
        """Without a lock both "finish", each deleting the other's checkpoints. After kill -9 the folder is free."""
        process = self.hold(tmp_path, tmp_path / "run")
        try:
            with pytest.raises(FolderInUse, match=rf"process {process.pid} on .*: wait for it, stop it, or choose"):
                opened(tmp_path / "run", overwrite=True)
            assert (tmp_path / "run" / "config.json").exists()
            process.signal(signal.SIGSTOP)  # a stopped process still holds it
            with pytest.raises(FolderInUse):
                opened(tmp_path / "run")
        finally:
            process.kill()
            process.wait(60)
        opened(tmp_path / "run")

    def test_a_restart_waits_for_the_process_it_replaces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        process = self.hold(tmp_path, tmp_path / "run", SLURM_JOB_ID="77")
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        opened(tmp_path / "run")
        assert process.wait(60) == -signal.SIGKILL


class TestOverwrite:
    def test_deletes_the_run(self, tmp_path: Path) -> None:
        opened(tmp_path, "--seed", "1").close()
        save(tmp_path, 1)
        opened(tmp_path, "--seed", "2", overwrite=True)
        assert not checkpoints_of(tmp_path)

    @pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "MIMIR_FAST_LAUNCH_ID"])
    @pytest.mark.parametrize("ended", [None, "finished", "interrupted"])
    def test_a_requeued_launch_keeps_its_own_until_it_has_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, ended: str | None
    ) -> None:
        """In an interactive job a person types the same command again and means it."""
        monkeypatch.setenv(variable, "77")
        first = opened(tmp_path)
        save(tmp_path, 1)
        if ended:
            first.end(ended)
        first.close()
        folder = opened(tmp_path, overwrite=True)
        assert bool(checkpoints_of(tmp_path)) == (not ended)
        assert ("made by this launch" in "".join(folder.notes)) == (not ended)

    def test_a_job_that_slurm_repeats_keeps_what_it_finished(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the first of two stages in a job that is requeued in the second, or a run told of the limit at its end."""
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        first = opened(tmp_path)
        save(tmp_path, 1)
        first.end("finished")
        first.close()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        opened(tmp_path, overwrite=True).close()
        assert names(tmp_path) == ["step-00000001"]

    def test_its_own_is_kept_from_another_configuration_with_advice_that_works(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        opened(tmp_path).close()
        save(tmp_path, 1)
        with pytest.raises(FileExistsError, match=r"so --overwrite keeps it. Choose .* or delete the folder"):
            opened(tmp_path, "--seed", "5", overwrite=True)

    def test_restarted_workers_know_their_torchrun(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A restart count alone, or an id that somebody gives every job, would make anybody's folder theirs."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "the same for all")
        opened(tmp_path).close()
        save(tmp_path, 1)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        opened(tmp_path, overwrite=True).close()
        assert names(tmp_path) == ["step-00000001"]
        monkeypatch.setattr("os.getppid", lambda: 1)
        opened(tmp_path, overwrite=True).close()
        assert not checkpoints_of(tmp_path)

    def test_every_start_is_remembered(self, tmp_path: Path) -> None:
        for _ in range(3):
            opened(tmp_path).close()
        recorded = json.loads((tmp_path / "environment.json").read_text())
        assert [set(start) >= {"commit", "started", "launch"} for start in recorded["earlier"]] == [True, True]
        assert not any("earlier" in start for start in recorded["earlier"])

    def test_what_no_run_writes_stays_and_is_named(self, tmp_path: Path) -> None:
        """Notes beside the run and in its folders, and what lies behind symbolic links."""
        run, disk = tmp_path / "run", tmp_path / "disk"
        opened(run).close()
        disk.mkdir()
        save(run, 1)
        (run / "checkpoints").rename(disk / "checkpoints")
        (run / "checkpoints").symlink_to(disk / "checkpoints")  # as people do whose home is small
        (disk / "archive").mkdir()
        (run / "checkpoints" / "step-00000009").symlink_to(disk / "archive")
        mine = ["notes.md", "checkpoints/keep/weights.pt", "pictures/for the paper.png", "wandb/run.log", "x.partial"]
        ours = ["pictures/reconstruction-00000004.png", "tensorboard/events.out.tfevents.1", "metrics.jsonl",
                "curves.png", "evaluation/quick/progress/plan.json", "evaluation/quick/report.html",
                "profile/rank-0.txt", "hangs/step-00000001/rank-0.txt", "config.json.partial"]  # fmt: skip
        for name in [*mine, *ours, "../disk/archive/weights.pt"]:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text(name)
        folder = opened(run, overwrite=True)
        left = contents(run)
        assert {name: left.pop(name) for name in mine} == {name: name for name in mine}
        assert set(left) == {".lock", "config.json", "environment.json"}
        assert (run / "checkpoints").is_symlink() and (disk / "archive" / "weights.pt").exists()
        (note,) = folder.notes
        assert "keeps what no run of ours writes: checkpoints/keep, notes.md, pictures/for the paper.png" in note

    def test_nothing_is_deleted_before_the_run_begins(self, tmp_path: Path) -> None:
        opened(tmp_path).close()
        save(tmp_path, 1)
        before = contents(tmp_path)
        folder = looked(tmp_path, "--seed", "7", overwrite=True)
        assert folder.choose() is None
        folder.close()
        assert contents(tmp_path).keys() == before.keys()

    def test_another_job_deletes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        opened(tmp_path).close()
        save(tmp_path, 1)
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        opened(tmp_path, overwrite=True)
        assert not checkpoints_of(tmp_path)


class TestDivergence:
    def test_is_not_repeated_for_ever(self, tmp_path: Path) -> None:
        """--max-restarts 3 would do the same steps three times; refused at once, each restart costs seconds."""
        folder = opened(tmp_path)
        for step, healthy in ((1, True), (2, True), (3, False)):
            save(tmp_path, step, healthy=healthy)
        folder.diverged(3, json.loads((tmp_path / "config.json").read_text()))
        folder.close()
        with pytest.raises(TrainingDiverged, match="diverged at step 3 and would do so again"):
            opened(tmp_path)
        changed = looked(tmp_path, "--blr", "1e-5", allow_changes=True)
        chosen = changed.choose()
        changed.begin()
        assert chosen is not None and chosen.name == "step-00000002"
        assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003.diverged"]
        changed.close()
        opened(tmp_path, "--blr", "1e-5")  # the mark is gone


def test_config_says_how_many_images_a_penalty_sees_and_is_resumed_with_others(tmp_path: Path) -> None:
    line = ["--data.limit", "48", "--batch_size", "16", "--max_steps", "4", "--stop_after", "1", "--device", "cpu"]
    for accum_iter, images in (("2", 8), ("1", 16)):
        pretrain(config_from([*line, "--output_dir", str(tmp_path), "--accum_iter", accum_iter]))
        assert json.loads((tmp_path / "config.json").read_text())["derived"] == {"penalty_images": images}
    assert read_meta(checkpoints_of(tmp_path)[-1])["step"] == 2
