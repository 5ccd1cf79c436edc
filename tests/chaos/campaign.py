"""Faults by the dozen, each repeatable by its seed, and a table of what was survived.

python tests/chaos/campaign.py --faults 300 --minutes 9 --write docs/reliability.md     (again and again: it goes on)
python tests/chaos/campaign.py --repeat 17                                              (one story, after a repair)

A run is started again and again; each start meets a fault, and while it is down its files may meet another. In the end
it must have finished with the same bits as the undisturbed run. Stories of other kinds (full disk, two hosts, bad
values) stand between such runs. What a seed plays is a function of the seed; its last result is a line of the record.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.bad_input import BAD_INPUT
from chaos.chains import CHAINS
from chaos.runs import Runs
from chaos.scenarios import SCENARIOS
from zygote import Zygote

from mimir_fast.versions import environment

RECORD = Path(__file__).with_name("record.jsonl")
Story = Callable[[Runs, Path, random.Random], dict[str, int]]
STORIES: dict[str, Story] = {**CHAINS, **SCENARIOS}


def story_of(seed: int) -> str:
    """Three chains, then a scenario, all of them in turn."""
    turn, place = divmod(seed, 4)
    return [*SCENARIOS][turn % len(SCENARIOS)] if place == 3 else [*CHAINS][(3 * turn + place) % len(CHAINS)]


def play(seed: int, runs: Runs) -> dict[str, Any]:
    """A line of the record: faults and how often each was survived, or why the story of `seed` failed."""
    name, started = story_of(seed), time.monotonic()
    folder = runs.folder / f"{name}-{seed}"
    folder.mkdir()
    survived: dict[str, int] = {}
    failure = None
    try:
        survived = STORIES[name](runs, folder / "run", random.Random(seed))
    except Exception:
        failure = traceback.format_exc()
    runs.clean(folder)
    seconds = round(time.monotonic() - started, 1)
    return {"seed": seed, "story": name, "survived": survived, "failure": failure, "seconds": seconds}


def birth_certificate() -> dict[str, str]:
    """Where and with what a line was made."""
    found = environment()
    machine = f"{found['cpu']}, {found['cpu_count']} cores"
    return {"commit": str(found["commit"]), "machine": machine, "torch": found["packages"]["torch"]}


def read(record: Path) -> dict[int, dict[str, Any]]:
    """Seed → its last result."""
    lines = record.read_text().splitlines() if record.exists() else []
    return {line["seed"]: line for line in map(json.loads, lines)}


def write(path: Path, results: dict[int, dict[str, Any]]) -> None:
    """Replace what stands between the two marks in `path`."""
    head, rest = path.read_text().split("<!-- campaign -->\n", 1)
    _, tail = rest.split("<!-- end -->", 1)
    path.write_text(f"{head}<!-- campaign -->\n{table(results)}<!-- end -->{tail}")


def table(results: dict[int, dict[str, Any]]) -> str:
    """Markdown: where and when, and a row for each kind of fault."""
    counts: Counter[str] = Counter()
    for result in results.values():
        counts.update(result["survived"])
    failed = [str(seed) for seed, result in results.items() if result["failure"]]
    minutes = sum(result["seconds"] for result in results.values()) / 60
    commits, machines = ({r[key] for r in results.values()} for key in ("commit", "machine"))
    bad = counts[BAD_INPUT]
    about = (
        f"{sum(counts.values()) - bad} faults and {bad} bad inputs in {len(results)} stories (seeds {min(results)} to "
        f"{max(results)}, {minutes:.0f} minutes on one core); failures: {', '.join(failed) or 'none'}. Commit "
        f"{', '.join(sorted(commits))}; {', '.join(sorted(machines))}, Python {platform.python_version()}, torch "
        f"{', '.join(sorted({r['torch'] for r in results.values()}))}, {platform.platform()}.\n\n"
    )
    rows = "\n".join(f"| {name} | {counts[name]} |" for name in sorted(counts))
    return f"{about}| fault | survived |\n| --- | ---: |\n{rows}\n| **all** | **{sum(counts.values())}** |\n"


def main() -> int:
    """The command; the number of failures of this start is the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300, help="enough, with those that are recorded")
    parser.add_argument("--minutes", type=float, default=9, help="no story is begun later")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument(
        "--first", type=int, default=0, help="seed; with a record of its own, so that both can be joined"
    )
    parser.add_argument("--repeat", type=int, nargs="*", default=[], help="only these seeds, recorded or not")
    parser.add_argument("--write", type=Path, help="a page with the marks <!-- campaign --> and <!-- end -->")
    options = parser.parse_args()
    deadline, results, failures = time.monotonic() + 60 * options.minutes, read(options.record), 0
    where = birth_certificate()
    with tempfile.TemporaryDirectory(prefix="chaos", ignore_cleanup_errors=True) as folder:
        zygote = Zygote(Path(folder))
        runs = Runs(Path(folder), zygote)
        seeds = iter(options.repeat or (seed for seed in range(options.first, 10**6) if seed not in results))
        while time.monotonic() < deadline and (seed := next(seeds, None)) is not None:
            survived = sum(sum(result["survived"].values()) for result in results.values())
            if survived >= options.faults and not options.repeat:
                break
            results[seed] = result = play(seed, runs) | where
            with options.record.open("a") as file:
                file.write(json.dumps(result) + "\n")
            failures += result["failure"] is not None
            print(f"seed {seed} ({result['story']}, {result['seconds']} s): {result['survived']}", flush=True)
            if result["failure"]:
                print(result["failure"], flush=True)
        zygote.close()
    if options.write:
        write(options.write, results)
    print(table(results))
    return failures


if __name__ == "__main__":
    sys.exit(main())
