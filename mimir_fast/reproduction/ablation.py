"""An ablation: rows that differ in their pre-training, seeds, equal budgets, one table.

A cell is one row at one seed: pre-train (or not), fine-tune, judge. Finished cells are lines of `results.jsonl`;
unfinished ones go on where they were. Starting the same command twice shares the cells between the two processes.

    OUTPUT/setup.json  results.jsonl  table.md  ablation.png  cells/ROW/seed0/{pretrain,finetune,judged,log.txt}
"""

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.data import build_loader
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.models.file_names import from_files
from mimir_fast.models.masked_model import build_masked_model
from mimir_fast.models.weight_files import read_weights
from mimir_fast.reproduction.gradient_share import gradient_share
from mimir_fast.reproduction.stages import Judge, Say, Stopwatch, judge, run_stage, steps_done
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.health import TrainingDiverged
from mimir_fast.training.loggers import read_lines
from mimir_fast.training.pretraining import PretrainConfig
from mimir_fast.versions import environment


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of its folder.
        title: in the table.
        pretrain: the whole pre-training configuration but seed and folder; None trains from scratch.
        published: what the paper reports for the like, for the table.
    """

    name: str
    title: str
    pretrain: PretrainConfig | None
    published: str = ""

    @property
    def penalty(self) -> MimirConfig | None:
        """The objective, where it has a mutual-information term of a fixed weight."""
        objective = None if self.pretrain is None else self.pretrain.objective
        if not isinstance(objective, MimirConfig) or objective.mi.estimator == "none" or objective.mi.share:
            return None
        return objective

    def tuning(self, ablation: "Ablation") -> FinetuneConfig | None:
        """Its fine-tuning but for seed, folder and init: that of all rows. None judges what pre-training left."""
        return ablation.finetune

    def pretrained_in(self, cells: Path, seed: int) -> Path:
        """The run folder of its pre-training."""
        return cells / self.name / f"seed{seed}" / "pretrain"


@dataclass(frozen=True)
class Ablation:
    """Rows, what they have in common, and where the results go.

    Attributes:
        finetune: of every row, but seed, folder and init.
        size: the budgets' name, for messages.
        note: said under the table: data, budgets, what is counted.
        first_seed: the others follow.
    """

    rows: tuple[Row, ...]
    finetune: FinetuneConfig
    rules: Judge
    num_seeds: int
    folder: Path
    size: str
    note: str = ""
    first_seed: int = 0

    def judged(self, row: Row, run: Path, folder: Path) -> tuple[dict[str, list[int]], dict[str, float]]:
        """Accuracies {measure: [correct, total]} of a cell's last run, and other measures; `folder` is of the cell."""
        counts = judge(run, self.finetune.data, self.rules, folder / "judged", device=self.finetune.run.device)
        return {name: [count.correct, count.total] for name, count in counts.items()}, {}

    @property
    def results(self) -> Path:
        """Finished cells, one JSON object a line."""
        return self.folder / "results.jsonl"


@dataclass
class CellResult:
    """What a cell found.

    Attributes:
        accuracy: measure → [correct, total].
        share: gradient of the penalty against that of the reconstruction, at the start and at the end of pre-training.
        seconds: stage → wall time of this start.
        cpu_seconds: the same of all threads of this process, of stages that were run whole in this start.
        measures: what else was measured.
        diverged: stages that ended so, and were gone on from with the last weights that were saved. Where there are
            none, or their outputs are no numbers, `accuracy` is empty.
    """

    row: str
    seed: int
    accuracy: dict[str, list[int]]
    share: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)


def run_ablation(ablation: Ablation, *, say: Say = print) -> list[CellResult]:
    """Run every cell that is not finished, seed by seed, and return all that are.

    Raises:
        ValueError: the folder holds an ablation with other budgets.
        Interrupted: a signal came; the same call goes on.
    """
    claim_folder(ablation)
    first = ablation.first_seed
    cells = [(row, seed) for seed in range(first, first + ablation.num_seeds) for row in ablation.rows]
    for number, (row, seed) in enumerate(cells, 1):
        folder = ablation.folder / "cells" / row.name / f"seed{seed}"
        with _only_one(folder) as mine:
            if not mine or (row.name, seed) in {(r.row, r.seed) for r in read_results(ablation.results)}:
                continue
            say(f"[{number}/{len(cells)}] {row.title}, seed {seed}")
            result = run_cell(row, seed, ablation, folder)
            append_result(ablation.results, result)
            say(f"    {_in_words(result)}   {sum(result.seconds.values()):.0f} s")
    return read_results(ablation.results)


def run_cell(row: Row, seed: int, ablation: Ablation, folder: Path) -> CellResult:
    """Pre-train, fine-tune, judge; what the stages print goes to log.txt."""
    result = CellResult(row.name, seed, {}, environment=environment())
    with (folder / "log.txt").open("a") as log, redirect_stdout(log):
        _fill(result, row, ablation, folder)
    return result


def _fill(result: CellResult, row: Row, ablation: Ablation, folder: Path) -> None:
    """The stages of a cell, each noted as it ends; the rest is left out where one left nothing to go on with."""
    watch, run, tune, seed = Stopwatch(), Path(), row.tuning(ablation), result.seed

    def stage(name: str, config: PretrainConfig | FinetuneConfig) -> Path | None:
        """The folder of the run; None where it diverged before anything was saved."""
        fresh, before = steps_done(config.folder) == 0, time.process_time()
        try:
            run_stage(config)
        except TrainingDiverged as error:
            print(error)
            result.diverged.append(name)
        if fresh:
            result.cpu_seconds[name] = round(time.process_time() - before, 1)
        result.seconds[name] = watch.lap()
        return config.folder if steps_done(config.folder) else None

    if row.pretrain is not None:
        where = row.pretrained_in(ablation.folder / "cells", seed)
        config = replace(row.pretrain, run=_placed(row.pretrain.run, seed, where))
        if (done := stage("pretrain", config)) is None:
            return
        run, result.share = done, penalty_shares(row, config)
    if tune is not None:
        init = "" if row.pretrain is None else str(run)
        tune = replace(tune, init=init, run=_placed(tune.run, seed, folder / "finetune"))
        if (done := stage("finetune", tune)) is None:
            return
        run = done
    watch.lap()
    before = time.process_time()
    try:
        result.accuracy, result.measures = ablation.judged(row, run, folder)
    except (ValueError, RuntimeError) as error:  # a model whose outputs are no numbers
        if not result.diverged:
            raise
        print(f"not judged: {error}")
    result.seconds["judge"], result.cpu_seconds["judge"] = watch.lap(), round(time.process_time() - before, 1)


def penalty_shares(row: Row, config: PretrainConfig) -> dict[str, float]:
    """{"init", "trained"}: ‖λ∇I‖ / ‖∇MSE‖ on one training batch, on the CPU; empty for rows without a penalty."""
    if row.penalty is None:
        return {}
    batch = next(iter(build_loader(config.data, split="train", batch_size=min(256, config.run.batch_size), seed=1)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = build_masked_model(config.model, config.data.image_size, config.data.channels)
    share = {"init": gradient_share(row.penalty, model, batch)}
    model.load_state_dict(from_files(model, read_weights(config.folder, "model").tensors))
    return share | {"trained": gradient_share(row.penalty, model, batch)}


def append_result(path: Path, result: CellResult) -> None:
    """Add a line; what a kill left of the one before is ended first, or this one would be lost with it."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two processes share the cells, and this file
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(asdict(result)) + "\n").encode())


def read_results(path: Path) -> list[CellResult]:
    """Finished cells; a line cut short by a kill is left out."""
    return [CellResult(**line) for line in read_lines(path)]


def whole_seeds(results: Sequence[CellResult]) -> list[CellResult]:
    """Without seeds of which a cell left nothing to judge: rows stay paired."""
    lost = {result.seed for result in results if not result.accuracy}
    return [result for result in results if result.seed not in lost]


def endings(results: Sequence[CellResult]) -> str:
    """A sentence about cells that diverged; "" where none did."""

    def named(cells: list[CellResult]) -> str:
        return ", ".join(f"{cell.row} of seed {cell.seed} ({' and '.join(cell.diverged)})" for cell in cells)

    kept = [cell for cell in results if cell.diverged and cell.accuracy]
    lost = [cell for cell in results if not cell.accuracy]
    said = [f"Diverged, and judged by the last weights that were saved: {named(kept)}."] if kept else []
    return " ".join(said + ([f"Diverged, with nothing left to judge: {named(lost)}."] if lost else []))


def claim_folder(ablation: Ablation) -> None:
    """Write setup.json, or check that the folder's is the same, but for where the images lie.

    Raises:
        ValueError: it is not.
    """
    rows = {row.name: asdict(row) for row in ablation.rows}
    shared = {"size": ablation.size, "finetune": asdict(ablation.finetune), "rules": asdict(ablation.rules)}
    setup = json.loads(json.dumps({**shared, "rows": rows}))
    path = ablation.folder / "setup.json"
    ablation.folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        known = json.loads(path.read_text())
        changed = [name for name in shared if _anywhere(known[name]) != _anywhere(setup[name])]
        rows_known = {name: known["rows"].get(name, row) for name, row in setup["rows"].items()}
        changed += [name for name, row in setup["rows"].items() if _anywhere(rows_known[name]) != _anywhere(row)]
        if changed:
            raise ValueError(
                f"{ablation.folder} holds an ablation with other settings ({', '.join(changed)} differ): "
                "give another --output_dir, or the settings it was started with"
            )
        setup["rows"] = known["rows"] | setup["rows"]
    if (text := json.dumps(setup, indent=1) + "\n") != (path.read_text() if path.exists() else ""):
        write_text(path, text)  # whole or not at all: another process may read it


def _anywhere(setup: Any) -> Any:
    """Without the folder of the images, wherever in it."""
    if not isinstance(setup, dict):
        return setup
    return {name: _anywhere(value) for name, value in setup.items() if name != "root"}


@contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
    """True for the one process that has the cell; the lock is the kernel's, so a killed process leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _placed(run: Any, seed: int, folder: Path) -> Any:
    return replace(run, seed=seed, output_dir=str(folder))


def _in_words(result: CellResult) -> str:
    found = [f"{name} {100 * correct / total:.1f} %" for name, (correct, total) in result.accuracy.items()]
    share = [f"|MI grad| / |MSE grad| {value:.1e} ({when})" for when, value in result.share.items()]
    ends = [f"{stage} diverged" for stage in result.diverged]
    return ", ".join([*found, *share, *ends])


def select(rows: Sequence[Row], names: str) -> tuple[Row, ...]:
    """The rows a comma-separated list names; all of them for an empty one.

    Raises:
        ValueError: there is no such row.
    """
    wanted = [name for name in names.split(",") if name]
    known = {row.name: row for row in rows}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in wanted) if wanted else tuple(rows)
