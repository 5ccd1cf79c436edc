"""launch/slurm.sbatch on a real Slurm: what stays ended, what comes back, and what is lost (nothing).

Each test is a story on one node with two ranks on the CPU; `pytest -m slow tests/test_slurm.py`, some minutes.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import command_environment
from slurm_cluster import Slurm

from mimir_fast.checkpoints.reading import checkpoints_of

pytestmark = [pytest.mark.slow]
TEMPLATE = str(Path(__file__).parents[1] / "launch" / "slurm.sbatch")
TINY = ["--recipe", "digits/mimir_vit_nano", "--model.encoder", "nano", "--model.patch_size", "8", "--data.limit", "32",
        "--batch_size", "16", "--device", "cpu", "--log_every", "1", "--save_every", "100000"]  # fmt: skip
FOR_EVER = ["--max_steps", "1000000"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        cluster = Slurm(Path(name), os.environ | command_environment() | {"MIN_SECONDS": "0"})
        try:
            yield cluster
        finally:
            cluster.close()


def submit(slurm: Slurm, run: str, *options: str, sbatch: tuple[str, ...] = (), **variables: str) -> str:
    """The id of a job of the template in the folder `run`."""
    sized = ["--gpus-per-node=2", "--cpus-per-task=2", "--time=60", f"--output={slurm.folder}/%j.log", *sbatch]
    return slurm.say("sbatch", "--parsable", *sized, TEMPLATE, *TINY, *options, variables={"RUN_DIR": run, **variables})


def running(slurm: Slurm, run: str, *options: str, sbatch: tuple[str, ...] = (), **variables: str) -> str:
    """The id of a job that trains for ever, in its steps."""
    job = submit(slurm, run, *FOR_EVER, *options, sbatch=sbatch, **variables)
    slurm.until(lambda: "step 3/" in slurm.log(job))
    return job


def warn(slurm: Slurm, job: str) -> None:
    """The signal that comes before the time limit."""
    slurm.say("scancel", "--batch", "--signal=USR1", job)


def steps(slurm: Slurm, run: str) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints_of(slurm.folder / run)]


def goes_on(slurm: Slurm, job: str, run: str) -> None:
    """After it was requeued: from the step that was saved."""
    saved = max(steps(slurm, run))
    slurm.start_again(job)
    slurm.until(lambda: f"resumed at step {saved} " in slurm.log(job))


def test_two_jobs_on_one_node_end_by_themselves(slurm: Slurm) -> None:
    jobs = [submit(slurm, f"end{number}", "--max_steps", "3") for number in range(2)]
    for number, job in enumerate(jobs):
        slurm.ends(job, "COMPLETED")
        assert "2 x cpu" in slurm.log(job) and "done: 3 steps" in slurm.log(job)
        assert json.loads((slurm.folder / f"end{number}" / "environment.json").read_text())["ended"] == "finished"


def test_the_time_limit(slurm: Slurm) -> None:
    """A real one: saved, without a word of torchrun's, and requeued."""
    job = running(slurm, "limit", sbatch=("--signal=B:USR1@10",))
    hours, minutes, _ = map(int, slurm.field(job, "RunTime").split(":"))
    slurm.say("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")  # minutes; it has begun
    assert re.search(r"CPUs=2\b", slurm.say("scontrol", "show", "step", f"{job}.0"))  # 1 unless srun is told
    slurm.ends(job, "PENDING", restarts=1)
    assert "stopped at step" in slurm.log(job)
    assert "SignalException" not in slurm.log(job) and "Traceback" not in slurm.log(job)
    goes_on(slurm, job, "limit")
    slurm.say("scancel", job)


def test_a_limit_that_leaves_no_time_to_train_does_not_requeue_for_ever(slurm: Slurm) -> None:
    job = running(slurm, "short", MIN_SECONDS="300")
    warn(slurm, job)
    slurm.ends(job, "FAILED")
    assert "give a longer --time" in slurm.log(job) and steps(slurm, "short")


def test_requeued_by_hand_while_its_node_drains_then_cancelled(slurm: Slurm) -> None:
    job = running(slurm, "drain", "--overwrite")
    node = slurm.say("hostname")
    slurm.say("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    slurm.say("scontrol", "requeue", job)
    slurm.ends(job, "PENDING", restarts=1)
    slurm.say("scontrol", "update", f"NodeName={node}", "State=RESUME")
    goes_on(slurm, job, "drain")
    before = steps(slurm, "drain")
    slurm.until(lambda: len(re.findall(r"^step \d", slurm.log(job), flags=re.M)) > max(before) + 2)
    slurm.say("scancel", job)
    slurm.ends(job, "CANCELLED", restarts=1)
    assert max(steps(slurm, "drain")) > max(before)


@pytest.mark.parametrize("partition", ["low", "grace"])
def test_preempted(slurm: Slurm, partition: str) -> None:
    """With a GraceTime only the step is told, and Slurm would leave the job failed."""
    job = running(slurm, f"preempted-{partition}", sbatch=(f"--partition={partition}",))
    other = slurm.say("sbatch", "--parsable", "--partition=high", "--exclusive", "--wrap=sleep 1")
    slurm.ends(job, "PENDING", restarts=1)
    slurm.ends(other, "COMPLETED")
    goes_on(slurm, job, f"preempted-{partition}")
    slurm.say("scancel", job)


def test_what_fails_stays_failed_and_a_folder_in_use_is_kept(slurm: Slurm) -> None:
    first = running(slurm, "shared")
    second = submit(slurm, "shared", "--overwrite", "--max_steps", "3")
    misspelt = submit(slurm, "misspelt", "--recipe", "digits/mimir_vit_nnao")
    slurm.ends(second, "FAILED")
    slurm.ends(misspelt, "FAILED")
    assert "is in use by process" in slurm.log(second) and "unknown recipe" in slurm.log(misspelt)
    assert slurm.field(first, "JobState") == "RUNNING" and not (slurm.folder / "misspelt").exists()
    slurm.say("scancel", first)


def test_of_an_array_one_task_is_requeued(slurm: Slurm) -> None:
    """The last one, whose own id is that of the whole array."""
    array = submit(slurm, "array", *FOR_EVER, sbatch=("--array=3-4",))
    ids = {task: slurm.field(f"{array}_{task}", "JobId") for task in (3, 4)}
    slurm.until(lambda: all("step 3/" in slurm.log(job) for job in ids.values()))
    warn(slurm, f"{array}_4")
    slurm.ends(f"{array}_4", "PENDING", restarts=1)
    assert slurm.field(f"{array}_3", "JobState") == "RUNNING" and slurm.field(f"{array}_3", "Restarts") == "0"
    seeds = [json.loads((slurm.folder / f"array-{task}" / "config.json").read_text())["run"]["seed"] for task in ids]
    assert seeds == [3, 4]
    slurm.say("scancel", array)


def test_several_copies_without_a_group_are_refused(slurm: Slurm) -> None:
    said = slurm.say("salloc", "-n2", "srun", "-n2", "python", "-m", "mimir_fast.pretrain", *TINY, check=False)
    assert "srun started 2 copies of this command" in said
