"""Faults by the dozen, each repeatable by its seed, and a table of what was survived.

python tests/chaos/campaign.py --faults 300 --seed 0 --minutes 60 --write docs/reliability.md

A run is started again and again; each start meets a fault, and while it is down its files may meet another. In the end
it must have finished with the same bits as the undisturbed run. Scenarios (full disk, two ranks, two hosts) stand
between such runs.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.faults import FILE_FAULTS, PROCESS_FAULTS
from chaos.runs import PATIENCE, Runs, whole_checkpoints
from chaos.scenarios import SCENARIOS
from chaos.zygote import Zygote

NOTHING_TO_LOSE = ("config.json cut short", "leftovers of other kills")  # may meet a run with any number of checkpoints


class Campaign:
    """Counts what was survived (`counts`) and what was not (`failures`, each with the seed that repeats it)."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.runs = folder, Runs(folder, zygote)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def chain(self, seed: int, most: int = 12) -> None:
        """One run from beginning to end through up to `most` faults."""
        rng = random.Random(seed)
        run = self.folder / f"chain-{seed}"
        met: list[str] = []
        try:
            for _ in range(most):
                name = rng.choice(list(PROCESS_FAULTS))
                met.append(name)
                process = PROCESS_FAULTS[name](self.runs, run, rng)
                self._no_traceback(process.said())
                self.counts[name] += 1
                if finished(run):
                    break
                if rng.random() < 0.6:
                    self._damage(run, rng, met)
            process = self.runs.start(run)
            assert process.wait(PATIENCE) == 0, process.said()
            self.runs.check_same(run)
        except Exception:
            self.failures.append(f"seed {seed}, after {met}:\n{traceback.format_exc()}")

    def scenario(self, name: str, seed: int) -> None:
        """One of the longer stories."""
        try:
            for part, count in SCENARIOS[name](self.runs, self.folder / f"{name}-{seed}", random.Random(seed)).items():
                self.counts[part] += count
        except Exception:
            self.failures.append(f"scenario {name}, seed {seed}:\n{traceback.format_exc()}")

    def _damage(self, run: Path, rng: random.Random, met: list[str]) -> None:
        name = rng.choice(list(FILE_FAULTS))
        if name not in NOTHING_TO_LOSE and len(whole_checkpoints(run)) < 2:
            return  # with nothing to fall back to the run rightly refuses; a test of its own has that
        if not (run / "config.json").exists() or not (run / "checkpoints").exists():
            return
        met.append(name)
        FILE_FAULTS[name](run, rng)
        self.counts[name] += 1

    @staticmethod
    def _no_traceback(said: str) -> None:
        assert "Traceback" not in said, said


def finished(run: Path) -> bool:
    """The last checkpoint is there."""
    found = whole_checkpoints(run)
    return bool(found) and json.loads((found[-1] / "meta.json").read_text())["step"] == 18


def table(counts: Counter[str]) -> str:
    """Markdown rows."""
    rows = "\n".join(f"| {name} | {counts[name]} |" for name in sorted(counts))
    return f"| fault | times |\n| --- | --- |\n{rows}\n| **all** | **{sum(counts.values())}** |\n"


def write(path: Path, campaign: Campaign, seeds: str, seconds: float) -> None:
    """Replace the table between the two marks in `path`."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    head, rest = path.read_text().split("<!-- campaign -->\n", 1)
    _, tail = rest.split("<!-- end -->", 1)
    made = (
        f"Seeds {seeds}, {seconds / 60:.0f} minutes, commit {commit}, Python {platform.python_version()}, "
        f"{platform.platform()}; failures: {len(campaign.failures)}.\n\n"
    )
    path.write_text(f"{head}<!-- campaign -->\n{made}{table(campaign.counts)}<!-- end -->{tail}")


def main() -> int:
    """The command; the number of failures is the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a page with the marks <!-- campaign --> and <!-- end -->")
    parser.add_argument("--only", nargs="*", default=list(SCENARIOS), help="scenarios to play once each")
    options = parser.parse_args()
    started, seed = time.monotonic(), options.seed
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        zygote = Zygote(Path(folder))
        campaign = Campaign(Path(folder), zygote)
        stories, known = list(options.only), 0
        while sum(campaign.counts.values()) < options.faults and time.monotonic() - started < 60 * options.minutes:
            if stories and seed % 2:
                campaign.scenario(name := stories.pop(0), seed)
            else:
                campaign.chain(seed)
                name = "chain"
            print(f"seed {seed} ({name}): {sum(campaign.counts.values())} faults survived", flush=True)
            for failure in campaign.failures[known:]:
                print(failure, flush=True)
            known = len(campaign.failures)
            seed += 1
            if options.write:
                write(options.write, campaign, f"{options.seed} to {seed - 1}", time.monotonic() - started)
        zygote.close()
    print(table(campaign.counts), *campaign.failures, sep="\n")
    return len(campaign.failures)


if __name__ == "__main__":
    sys.exit(main())
