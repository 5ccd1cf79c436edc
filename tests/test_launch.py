"""The launch templates: each is read by a parser, and every option in them is one the commands have."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import command_environment

from mimir_fast.checkpoints.reading import checkpoints_of
from mimir_fast.pretrain import config_from

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
WAIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def mimir_flags(words: list[str]) -> list[str]:
    """What comes after `-m mimir_fast.pretrain`, without shell variables."""
    words = words[words.index("mimir_fast.pretrain") + 1 :]
    return [word.replace('"${RUN_DIR:-runs/mimir}${task:+-$task}"', "runs/mimir") for word in words]


def torchrun_flags(words: list[str]) -> list[str]:
    """What stands between torchrun and -m, with plausible values for shell variables."""
    found = words[words.index(next(w for w in words if w.endswith("torchrun"))) + 1 : words.index("-m")]
    return [re.sub(r'"?\$\{?[A-Za-z_:0-9-]*\}?(:29500|:\$port)?"?', "2", word) for word in found]


def check(words: list[str]) -> None:
    """Both parsers take what the template gives them."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args([*torchrun_flags(words), "-m", "mimir_fast.pretrain"])
    assert parsed.max_restarts == 3 and parsed.rdzv_backend == "c10d"
    assert config_from(mimir_flags(words)).run.save_minutes == 15


def test_slurm() -> None:
    path = LAUNCH / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.M))
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["signal"] == "B:USR1@300"
    command = re.search(r"^srun .*? bash (torchrun.*?) \"\$@\" &$", text, flags=re.M | re.S)
    assert command is not None
    check(command.group(1).replace('${task:+--seed "$task"}', "").replace("\\\n", " ").split())


@pytest.mark.parametrize(
    ("srun", "scontrol", "variables", "code", "requeued"),
    [
        ("exit 0", "", {}, 0, None),
        ("exit 1", "PreemptTime=None", {}, 1, None),  # a failure: misspelt, diverged, a folder in use
        ("exit 1", "PreemptTime=2026-01-01T00:00:00", {}, 1, "7"),  # told in a partition's GraceTime
        ("limit", "PreemptTime=None", {"MIN_SECONDS": "0"}, 0, "7"),
        ("limit", "PreemptTime=None", {}, 1, None),  # a start that could only save
        ("limit", "PreemptTime=None", {"MIN_SECONDS": "0", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, 0,
         "7_2"),
    ],
)  # fmt: skip
def test_slurm_requeues_only_what_the_scheduler_ended(
    tmp_path: Path, srun: str, scontrol: str, variables: dict[str, str], code: int, requeued: str | None
) -> None:
    """The script itself, with programs in the scheduler's place; on a real one: test_slurm.py."""
    limit = "trap 'exit 0' USR1; kill -USR1 $PPID; while :; do sleep 0.05; done"
    for name, body in (("scontrol", f"echo {scontrol or 'node1'}"), ("srun", limit if srun == "limit" else srun)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{body}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7",
                   "SLURM_NNODES": "2", "RUN_DIR": "run", **variables}  # fmt: skip
    line = ["bash", str(LAUNCH / "slurm.sbatch"), "--recipe", "digits/mimir_vit_tiny"]
    assert subprocess.run(line, cwd=tmp_path, env=environment, timeout=60).returncode == code
    calls = (tmp_path / "calls").read_text()
    assert re.findall(r"^scontrol requeue (.*)$", calls, flags=re.M) == ([requeued] if requeued else [])
    assert ("--output_dir run-2 --seed 2 " in calls) == ("SLURM_ARRAY_TASK_ID" in variables)
    assert re.search(r"^srun .*--nproc_per_node=1 .*--rdzv_id=7 .*:20007 .*mimir_vit_tiny$", calls, flags=re.M)


def test_jobset() -> None:
    jobset: dict[str, Any] = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    check(words)
    assert f"--nnodes={job['parallelism']}" in words and job["parallelism"] == job["completions"]
    name = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
    assert f"--rdzv_endpoint={name}:{container['ports'][0]['containerPort']}" in words
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] >= 60 and pod["restartPolicy"] == "Never"


def test_skypilot() -> None:
    task: dict[str, Any] = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "num_nodes", "resources", "file_mounts", "workdir", "setup", "run"}
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    words = task["run"].replace("\\\n", " ").split()
    check(words[words.index(".venv/bin/torchrun") :])
    assert task["file_mounts"]["/runs"]["mode"].startswith("MOUNT")


def test_torchrun_waits_for_a_slow_save_but_not_longer_than_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import get_args_parser

    slurm, sky = (LAUNCH / "slurm.sbatch").read_text(), (LAUNCH / "skypilot.yaml").read_text()
    (workers,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    kubernetes = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    found = [re.search(rf"^ *export {WAIT}=(?:\$\{{{WAIT}:-)?(\d+)", text, flags=re.M) for text in (slurm, sky)]
    seconds = [int(match[1]) for match in found if match] + [int(kubernetes[WAIT])]
    # Slurm signals 300 s before the end, Kubernetes has its grace period, a spot machine gets at most 120 s of notice.
    assert len(seconds) == 3 and [s + 10 <= end for s, end in zip(seconds, (300, 120, 300), strict=True)] == [True] * 3
    assert pod["terminationGracePeriodSeconds"] == 300 and "USR1@300" in slurm
    if "--shutdown-timeout" not in get_args_parser().format_help():
        pytest.skip("this torch always kills after 30 seconds")
    for wait in seconds:  # the variable is the one this torch reads
        monkeypatch.setenv(WAIT, str(wait))
        assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == wait


def documented() -> dict[str, str]:
    """Templates, and blocks of the documentation in which torchrun restarts workers."""
    texts = {path.name: path.read_text() for path in LAUNCH.iterdir() if path.suffix != ".md"}
    for page in (ROOT / "README.md", LAUNCH / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        found = [*re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S), *re.findall(r"(?<!`)`([^`\n]+)`", text)]
        restarting = [block for block in found if "torchrun" in block and re.search("--max.restarts", block)]
        texts |= {f"{page.relative_to(ROOT)} {number}": block for number, block in enumerate(restarting)}
    return texts


def test_restarted_workers_never_look_for_the_last_attempts_address() -> None:
    texts = documented()
    assert len(texts) >= 7
    assert [name for name, text in texts.items() if OWN_STORE not in text or WAIT not in text] == []


SLOW_DISK = """
import os, time
def fsync(descriptor, really=os.fsync):
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
        time.sleep(40)
    really(descriptor)
os.fsync = fsync
"""


@pytest.mark.slow
@pytest.mark.parametrize(("wait", "saved"), [("90", True), (None, False)])
def test_a_save_of_forty_seconds(tmp_path: Path, wait: str | None, saved: bool) -> None:
    """After SIGTERM to torchrun; without the variable it is lost, which is why the templates set it."""
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    options = ["--import", "slow_disk", "--output_dir", "run", "--max_steps", "100000", "--log_every", "1",
               "--save_every", "100000", "--batch_size", "8", "--device", "cpu"]  # fmt: skip
    line = [*torchrun, "-m", "mimir_fast.pretrain", *options]
    environment = command_environment() | ({} if wait is None else {WAIT: wait})
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert bool(checkpoints_of(tmp_path / "run")) is saved


@pytest.mark.parametrize("name", ["slurm.sbatch", "jobset.yaml", "skypilot.yaml"])
def test_the_page_speaks_of_all(name: str) -> None:
    assert name in (LAUNCH / "README.md").read_text()
