"""The commands from Python, with the options that are typed.

import mimir_fast

run = mimir_fast.pretrain(data="digits", recipe="digits/mimir_vit_nano", max_steps=100)
robust = mimir_fast.finetune(run, attack={"eps": "8/255"})
results = mimir_fast.evaluate(robust, suite="quick")        # or evaluate(model, images, labels)
outcomes = mimir_fast.probe(run, probes=["knn"])
mimir_fast.load(robust).predict("x.png")

Options have the names of the command line, nested as in a run's config.json: data={"root": …}, attack={"eps": …}. A
value may be given as it is typed, such as "8/255". Nothing proposes what to type next.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from mimir_fast.config_file import words_of
from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import SOURCES
from mimir_fast.plain_errors import in_python, reason_in_box

if TYPE_CHECKING:
    from mimir_fast.evaluation.results import Results
    from mimir_fast.probing.run import Outcome

T = TypeVar("T")
Data = str | Path | Mapping[str, Any] | DataConfig | None
"""A source's name (digits), a folder of images, or the options of data by name; None leaves them to recipe or run."""


def pretrain(data: Data = None, recipe: str = "", **options: Any) -> Path:
    """`python -m mimir_fast.pretrain`: pre-train to the end, or go on; returns the run's folder.

    Args:
        data: see `Data`.
        recipe: named starting point of all options.
        options: of the command, `mimir_fast.training.pretraining.PretrainConfig`.
    Raises:
        ValueError, OSError, ImportError: as the command says them in one line.
        InterruptedError: a signal stopped it; all is saved, and the same call goes on.
    """
    from mimir_fast.training.pretraining import pretrain

    with in_python():
        config = _configured("pretrain", data, recipe=recipe, **options)
        return _finished(pretrain(config), config)


def finetune(init: str | Path = "", data: Data = None, recipe: str = "", **options: Any) -> Path:
    """`python -m mimir_fast.finetune`: train a classifier to the end, or go on; returns the run's folder.

    Args:
        init: run or file of weights to start from; where no recipe is named, a run brings its images and encoder.
        data, recipe: as of `pretrain`.
        options: of the command, `mimir_fast.training.finetuning.FinetuneConfig`.
    Raises:
        ValueError, OSError, ImportError: as the command says them in one line.
        InterruptedError: a signal stopped it; all is saved, and the same call goes on.
    """
    from mimir_fast.training.finetuning import finetune

    with in_python():
        config = _configured("finetune", data, init=init, recipe=recipe, **options)
        return _finished(finetune(config), config)


def evaluate(
    model: str | Path | nn.Module | Callable[[Tensor], Any], images: Tensor | None = None,
    labels: Tensor | Sequence[int] | None = None, *, data: Data = None, **options: Any,
) -> "Results":  # fmt: skip
    """Judge a checkpoint on its test images, or a model in memory on images in memory.

    Args:
        model: what `--checkpoint` takes; or a module or callable, images (B, C, H, W) in [0, 1] → logits (B, K).
        images: (N, C, H, W), with a model in memory only; see `mimir_fast.evaluation.evaluate`.
        labels: (N,) class numbers.
        data: as of `pretrain`, for a checkpoint.
        options: of the command, `mimir_fast.evaluation.config.EvaluateConfig`.
    Raises:
        ValueError, OSError, ImportError: as the command says them in one line.
    """
    if isinstance(model, (str, Path)):
        if images is not None or labels is not None:
            raise ValueError("images in memory go with a model in memory: give data=… with a checkpoint, or load it")
        from mimir_fast.evaluation.run import evaluate as evaluate_checkpoint

        with in_python():
            config = _configured("evaluate", data, checkpoint=model, **options)
            return evaluate_checkpoint(config, log=lambda line: None)
    if images is None or labels is None or data is not None:
        raise ValueError("a model in memory is judged on images in memory: evaluate(model, images, labels)")
    from mimir_fast.evaluation.given import evaluate as evaluate_model

    with in_python():
        return evaluate_model(model, images, labels, **options)


def probe(checkpoint: str | Path, data: Data = None, **options: Any) -> "list[Outcome]":
    """`python -m mimir_fast.probe`: what a frozen encoder knows.

    Args:
        checkpoint: what `--checkpoint` takes.
        data: as of `pretrain`.
        options: of the command, `mimir_fast.probing.config.ProbingConfig`.
    Raises:
        ValueError, OSError, ImportError: as the command says them in one line.
    """
    command: Any = import_module("mimir_fast.probe")
    with in_python():
        outcomes: list[Outcome] = command.probe(_configured("probe", data, checkpoint=checkpoint, **options))
    return outcomes


def _finished(folder: Path, config: Any) -> Path:
    """The folder, if all steps are done or fewer were asked for: who calls goes on with it as a whole run."""
    from mimir_fast.training.launch import FINISHED
    from mimir_fast.training.ownership import read_json

    ended = read_json(folder / "environment.json").get("ended")
    wanted = config.run.stop_after is not None or config.run.dry_run
    if ended != FINISHED and not wanted and os.environ.get("RANK", "0") == "0":
        raise InterruptedError(f"a signal stopped the run in {folder}, which is saved: the same call goes on")
    return folder


def _configured(command: str, data: Data, **options: Any) -> Any:
    """The configuration that the command would have with these options."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    given = {name: value for name, value in given.items() if not (name in ("init", "recipe") and value == "")}
    words = words_of(given | ({} if data is None else {"data": _data_options(data, command)}))
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return import_module(f"mimir_fast.{command}").config_from(words)
    except SystemExit:
        raise ValueError(f"{command}: {reason_in_box(said.getvalue())}") from None


def _data_options(data: str | Path | Mapping[str, Any] | DataConfig, command: str) -> dict[str, Any]:
    if isinstance(data, DataConfig):
        return {name: value for name, value in asdict(data).items() if value != asdict(DataConfig())[name]}
    if isinstance(data, Mapping):
        return dict(data)
    if not isinstance(data, (str, Path)):
        raise TypeError(
            f"data={type(data).__name__}, wanted a source's name, a folder of images or the options of data by name"
        )
    if str(data) in SOURCES.all():
        return {"source": str(data)}
    if Path(data).is_dir():
        # Pre-training needs no labels.
        return {"source": "images" if command == "pretrain" else "folder", "root": str(data)}
    raise ValueError(f"data={str(data)!r}: wanted a folder of images or one of {', '.join(SOURCES.all())}")
