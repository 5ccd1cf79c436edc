"""A save that is killed at each of its system calls in turn: always a whole checkpoint, and a run that goes on.

python tests/chaos/every_call.py --record every_call.jsonl        (again and again: it goes on)

A real run is trained for some steps; its second checkpoint is then written again by `one_save` into a copy of the run
that has the first one only, under strace, which kills the process when it enters its N-th system call. Calls that only
ask for a number or for memory are not counted: nothing on the disk changes between them. After each kill the run's
folder is opened as a start opens it, the checkpoint that it chooses is read and compared bit by bit with what was
saved, and every `FULL`-th run is trained to its end, which must have the same bits as the undisturbed one.
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
CALLS = "!getpid,getrandom,brk"  # all but those that ask for a number or for memory: 2,600 of 2,800 in a save
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

    def killed_at(self, number: int) -> str | None:
        """The system call at whose entry it was killed, or None where the save makes fewer; checks what is left."""
        run = self.runs.folder / f"killed-{number}"
        shutil.copytree(self.before, run, symlinks=True)
        process = self.runs.zygote.start(
            "chaos.one_save", [str(run), str(self.new)], env={"PYTHONPATH": TESTS}
        )  # fmt: skip
        code, process, trace = play_with(process, CALLS, f"signal=KILL:when={number}")
        assert code in (0, -9), process.said()
        chosen = self._open(run)
        for name, tensor in read_tensors(chosen, "").items():
            assert tensor.equal(self.tensors[step_of(chosen)][name]), f"{chosen}: {name} is another"
        left = [name for name in contents(run) if ".partial" in name]
        assert not left, f"{left} stay after a start"
        if code == 0:
            assert step_of(chosen) == step_of(self.new)
        if number % FULL == 0 or code == 0:
            self.runs.finish(run, job=self.job)
            assert final_tensors(run) == final_tensors(self.runs.reference(self.job)), f"{run} ended with other bits"
        self.runs.clean(run)
        calls = [found[1] for line in trace.splitlines() if (found := _CALL.match(line))]
        return None if code == 0 else calls[number - 1]

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
    parser.add_argument("--every", type=int, default=1, help="only each N-th system call")
    options = parser.parse_args()
    lines = options.record.read_text().splitlines() if options.record.exists() else []
    done: dict[int, str | None] = {line["number"]: line["call"] for line in map(json.loads, lines)}
    with tempfile.TemporaryDirectory(prefix="every-call", ignore_cleanup_errors=True) as folder:
        zygote = Zygote(Path(folder))
        save, number = Save(Runs(Path(folder), zygote)), 0
        while None not in done.values():
            number += options.every
            if number in done:
                continue
            done[number] = save.killed_at(number)
            with options.record.open("a") as file:
                file.write(json.dumps({"number": number, "call": done[number]}) + "\n")
        zygote.close()
    counts = Counter(call for call in done.values() if call)
    print(f"killed at {sum(counts.values())} system calls, none lost a checkpoint: {dict(counts.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
