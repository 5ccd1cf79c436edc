"""A save that is killed at each of its system calls in turn: always a whole checkpoint, and a run that goes on.

python tests/chaos/every_call.py --record every_call.jsonl        (again and again: it goes on)

A real run is trained for some steps; its second checkpoint is then written again by `one_save` into a copy of the run
that has the first one only, under strace, which kills the process when it enters the N-th call of one name: all names,
all N. Calls that only ask for a number or for memory are left out: nothing on the disk changes between them. After each
kill the run's folder is opened as a start opens it, the checkpoint that it chooses is read and compared bit by bit with
what was saved, and every `FULL`-th run is trained to its end, which must have the same bits as the undisturbed one.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.faults import play_with
from chaos.runs import PRETRAIN, TESTS, Runs, contents, final_tensors
from zygote import Zygote

from mimir_fast.checkpoints.reading import checkpoints_of, read_tensors, step_of
from mimir_fast.checkpoints.saving import ALONE
from mimir_fast.pretrain import config_from
from mimir_fast.training.run_folder import RunFolder

FULL = 20
LEFT_OUT = "!getpid,getrandom,brk,mmap,munmap"  # 2,600 of 2,800 calls of a save
NEVER = 60_000  # the call that no save comes to
_CALL = re.compile(r"^\d+ +(?:<\.\.\. )?(\w+)")


class Save:
    """The run, its two checkpoints, and the save that is killed.

    Args:
        runs: starts processes, below its folder.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs, self.job = runs, PRETRAIN
        self.before, self.after = (runs.folder / name for name in ("before", "after"))
        for run, stop_after in ((self.before, "2"), (self.after, "4")):
            runs.finish(run, "--stop_after", stop_after, "--keep_last", "1")
        (self.new,) = checkpoints_of(self.after)
        self.tensors = {
            step_of(c): read_tensors(c, "") for run in (self.before, self.after) for c in checkpoints_of(run)
        }

    def calls(self) -> Counter[str]:
        """How many of each name a save makes."""
        run = self.runs.folder / "counted"
        code, said, trace = self._save(run, LEFT_OUT, NEVER)
        assert code == 0, said
        assert step_of(self._open(run)) == step_of(self.new)
        self.runs.clean(run)
        return Counter(found[1] for line in trace.splitlines() if (found := _CALL.match(line)))

    def killed_at(self, name: str, number: int, *, full: bool) -> bool:
        """Kill a save at the entry of a call; False where it makes fewer. Checks what is left.

        Args:
            full: train to the end as well.
        """
        run = self.runs.folder / f"killed-{name}-{number}"
        code, said, _ = self._save(run, name, number)
        assert code in (0, -9), said
        chosen = self._open(run)
        for name, tensor in read_tensors(chosen, "").items():
            assert tensor.equal(self.tensors[step_of(chosen)][name]), f"{chosen}: {name} is another"
        left = [name for name in contents(run) if ".partial" in name]
        assert not left, f"{left} stay after a start"
        if full:
            self.runs.finish(run, job=self.job)
            assert final_tensors(run) == final_tensors(self.runs.reference(self.job)), f"{run} ended with other bits"
        self.runs.clean(run)
        return code != 0

    def _save(self, run: Path, names: str, number: int) -> tuple[int, str, str]:
        shutil.copytree(self.before, run, symlinks=True)
        process = self.runs.zygote.start(
            "chaos.one_save", [str(run), str(self.new)], env={"PYTHONPATH": TESTS}
        )  # fmt: skip
        code, process, trace = play_with(process, names, f"signal=KILL:when={number}")
        return code, process.said(), trace

    def _open(self, run: Path) -> Path:
        """The checkpoint that a start goes on from, after it has begun."""
        line = [*self.job.args, "--output_dir", str(run)]
        folder = RunFolder(run, ALONE)
        try:
            folder.open(config_from(line), resume=True, overwrite=False, allow_changes=False)
            chosen = folder.choose()
            folder.begin()
        finally:
            folder.close()
        assert chosen is not None and not any("damaged" in note for note in folder.notes), folder.notes
        return chosen


def main() -> int:
    """The command: a line for each system call, then how many of which kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args()
    lines = options.record.read_text().splitlines() if options.record.exists() else []
    done = {(line["call"], line["number"]) for line in map(json.loads, lines)}
    with tempfile.TemporaryDirectory(prefix="every-call", ignore_cleanup_errors=True) as folder:
        zygote = Zygote(Path(folder))
        save = Save(Runs(Path(folder), zygote))
        for name, most in save.calls().items():
            for number in range(1, most + 1):
                if (name, number) in done:
                    continue
                if save.killed_at(name, number, full=len(done) % FULL == 0):
                    done.add((name, number))
                    with options.record.open("a") as file:
                        file.write(json.dumps({"call": name, "number": number}) + "\n")
        zygote.close()
    counts = Counter(name for name, _ in done)
    print(f"killed at {len(done)} system calls, none lost a checkpoint: {dict(counts.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
