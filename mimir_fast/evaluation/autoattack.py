"""AutoAttack by its authors' own package, with progress on disk after every batch.

The four attacks of *standard* run one after the other, each on the images the ones before left standing (Croce & Hein,
arXiv 2003.01690). The attacks are `pyautoattack`'s objects with its settings and its batches; only the loop around them
is ours, because the package saves nothing within an attack, and an attack on 10,000 images takes hours. So the numbers
equal those of a direct call with the same images, batch size and seed, also after a kill.

Shapes: N images, C channels, H × W pixels.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.evaluation.config import Norm
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import fingerprint, write_atomically
from mimir_fast.evaluation.precision import strict_fp32
from mimir_fast.layers.borrowing import borrowed

Version = Literal["standard", "plus", "rand"]
ATTACKS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
STANDING = "none"
_LOG = logging.getLogger(__name__)


@dataclass
class Progress:
    """What is known so far; everything needed to go on.

    Attributes:
        fingerprint: of the settings the numbers depend on.
        broken_by: an image → the attack that broke it, `clean` for misclassified ones, `none` while it stands.
        entered: the images that stood when the attack in progress began: its batches are cut from them.
        attack: number of the attack in progress.
        batch: its next batch.
        after: accuracy count after each finished stage, `clean` first.
        seconds: an attack → time spent.
        warnings: what the package's own checks had to say.
    """

    fingerprint: str
    broken_by: list[str] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    attack: int = 0
    batch: int = 0
    after: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def standing(self) -> list[int]:
        """Images not broken yet."""
        return [i for i, name in enumerate(self.broken_by) if name == STANDING]


def run_autoattack(
    model: nn.Module,
    shard: EvaluationImages,
    eps: float,
    *,
    batch_size: int,
    device: torch.device,
    state: Path | None = None,
    seed: int = 0,
    version: Version = "standard",
    attacks: Sequence[str] | None = None,
    norm: Norm = "linf",
    settings: Any = None,
    say: Callable[[str], None] = _LOG.info,
    tick: Callable[[float], None] = lambda share: None,
    keep: Callable[[Tensor, Tensor, Tensor, str], None] | None = None,
) -> Progress:
    """AutoAttack on a shard, in fp32.

    Args:
        model: takes images in [0, 1], returns logits; parameters' gradients and global random state are left alone.
        eps: radius in units of [0, 1].
        state: JSON file of the progress; goes on where it ends.
        seed: the package seeds each batch of each attack with it.
        version: `standard`, `plus`, or `rand` for models that are not deterministic.
        attacks: only these of the version's attacks, such as ("apgd-ce", "apgd-t"). What they leave standing may fall
            to the others, so the caller must not call it AutoAttack's accuracy.
        norm: of the ball.
        settings: JSON-able, whatever else the numbers depend on (checkpoint, data).
        say: told one line an attack.
        tick: told after each batch which part of the work is done, 0 … 1.
        keep: given (images, labels, samples, attack) of what was broken, a batch at a time.
    Returns:
        the finished progress: `broken_by`, `after`, `seconds`, `warnings`.
    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: fewer than 4 classes, an attack the version does not have, or `state` belongs to another evaluation.
    """
    part = [] if attacks is None else [list(attacks)]
    identity = fingerprint([settings, norm, eps, batch_size, seed, version, len(shard), *part])
    progress = _load(state, identity)
    with borrowed(model, "eval") as module, strict_fp32(device), _frozen(module), torch.no_grad():
        warnings: list[str] = []
        attack = _package(module, eps, device, seed, version, norm, warnings)
        names = list(attack.attacks_to_run if attacks is None else attacks)
        if unknown := set(names) - set(attack.attacks_to_run):
            raise ValueError(f"AutoAttack {version} has no {sorted(unknown)}, only {attack.attacks_to_run}")

        def save() -> None:
            progress.warnings = sorted({*progress.warnings, *warnings})
            _save(state, progress)

        def told() -> None:
            tick(_share_done(names, progress, batch_size))

        if len(shard) == 0:
            progress.after, progress.attack = {"clean": 0}, len(names)
        elif not progress.broken_by:
            x, y, _ = next(shard.batches(batch_size, device))
            _check(attack, x, y)
            progress.broken_by = _misclassified(module, shard, batch_size, device)
            progress.after["clean"] = len(progress.standing())
            progress.entered = progress.standing()
            save()
        if len(shard) and progress.attack < len(names):
            x, _, _ = next(shard.batches(1, device))
            _fit_classes(attack, module(x).shape[-1])
        while progress.attack < len(names) and progress.standing():
            name = names[progress.attack]
            _run_one(attack, name, progress, shard, batch_size, device, save, told, keep)
            progress.after[name] = len(progress.standing())
            say(f"AutoAttack {name}: {progress.after[name]} of {len(shard)} stand, {progress.seconds[name]:.0f} s")
            progress.attack, progress.batch, progress.entered = progress.attack + 1, 0, progress.standing()
            save()
        progress.attack = len(names)
        warnings += square_warning(progress.after, len(shard))
        save()
    return progress


def square_warning(after: dict[str, int], total: int) -> list[str]:
    """The package's last check: Square, which sees no gradient, must not find what the gradient attacks missed.

    Args:
        after: standing images after each attack, `clean` first, over all shards.
        total: images judged.
    """
    from pyautoattack import checks

    found: list[str] = []
    if total:
        checks.check_square_sr({name: count / total for name, count in after.items()}, logger=_listening(found))
    return found


def _share_done(names: Sequence[str], progress: Progress, batch_size: int) -> float:
    """Part of the work that is done, weighing the attacks by what they cost on images that stand."""
    weights = [{"apgd-t": 9.0, "fab-t": 18.0, "fab": 10.0, "square": 17.0}.get(name, 1.0) for name in names]
    batches = max(1, -(-len(progress.entered) // batch_size))
    inside = progress.batch / batches if progress.attack < len(names) else 0.0
    done = sum(weights[: progress.attack]) + (weights[progress.attack] * inside if inside else 0.0)
    return min(1.0, done / sum(weights))


def _run_one(
    attack: Any, name: str, progress: Progress, shard: EvaluationImages, batch_size: int, device: torch.device,
    save: Callable[[], None], tick: Callable[[], None],
    keep: Callable[[Tensor, Tensor, Tensor, str], None] | None,
) -> None:  # fmt: skip
    started = time.perf_counter() - progress.seconds.get(name, 0.0)
    perturb = _prepared(attack, name)
    while progress.batch * batch_size < len(progress.entered):
        first = progress.batch * batch_size
        rows = torch.tensor(progress.entered[first : first + batch_size])
        x = shard.images[rows].to(device).float() / 255
        y = shard.labels[rows].to(device)
        # A copy goes in: the package reshapes a lone label in place.
        adversarial = perturb(x.clone(), y.clone())
        wrong = attack.get_logits(adversarial).argmax(dim=1) != y
        for row in rows[wrong.cpu()].tolist():
            progress.broken_by[row] = name
        if keep is not None and bool(wrong.any()):
            keep(adversarial[wrong], y[wrong], shard.samples[rows][wrong.cpu()], name)
        progress.batch += 1
        progress.seconds[name] = time.perf_counter() - started
        save()
        tick()


def _prepared(attack: Any, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The package's attack object behind a name, set as its own loop sets it."""
    if name in ("apgd-ce", "apgd-dlr"):
        attack.apgd.loss = name.removeprefix("apgd-")
        chosen = attack.apgd
    elif name == "apgd-t":
        chosen = attack.apgd_targeted
    elif name in ("fab", "fab-t"):
        attack.fab.targeted = name == "fab-t"
        if attack.fab.targeted:
            attack.fab.n_restarts = 1
        chosen = attack.fab
    else:
        chosen = attack.square
    chosen.seed = attack.get_seed()
    return chosen.perturb


def _package(
    module: nn.Module, eps: float, device: torch.device, seed: int, version: Version, norm: Norm, warnings: list[str]
) -> Any:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            "AutoAttack comes from its authors' package: pip install pyautoattack (the name `autoattack` is not theirs)"
        ) from error
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    attack = AutoAttack(module, eps=eps, norm=name, version=version, device=device, seed=seed)
    logger = _listening(warnings)
    attack.logger = attack.apgd.logger = attack.apgd_targeted.logger = logger
    return attack


def _listening(warnings: list[str]) -> logging.Logger:
    """A logger of our own that collects the package's warnings: they belong into the report."""
    logger = logging.Logger("pyautoattack", logging.WARNING)
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    return logger


def _fit_classes(attack: Any, num_classes: int) -> None:
    """Fewer than ten classes have fewer than nine wrong ones; the package would index beyond them."""
    if num_classes < 4:
        raise ValueError(
            f"AutoAttack's targeted DLR loss compares the 4 largest logits, but the model has {num_classes} classes: "
            "leave AutoAttack out (--suite quick); PGD and APGD with cross entropy work"
        )
    attack.apgd_targeted.n_target_classes = min(attack.apgd_targeted.n_target_classes, num_classes - 1)
    attack.fab.n_target_classes = min(attack.fab.n_target_classes, num_classes - 1)


def _check(attack: Any, x: Tensor, y: Tensor) -> None:
    """The package's own checks of the model; what they find goes to the log."""
    from pyautoattack import checks

    checks.check_range_output(attack.get_logits, x, logger=attack.logger)
    if attack.version != "rand":
        checks.check_randomized(attack.get_logits, x, y, bs=len(x), logger=attack.logger)
    checks.check_dynamic(attack.model, x, False, logger=attack.logger)


def _misclassified(module: nn.Module, shard: EvaluationImages, batch_size: int, device: torch.device) -> list[str]:
    names: list[str] = []
    for x, y, _ in shard.batches(batch_size, device):
        names += [STANDING if right else "clean" for right in (module(x).argmax(dim=1) == y).tolist()]
    return names


def _load(state: Path | None, identity: str) -> Progress:
    if state is None or not state.exists():
        return Progress(identity)
    saved = json.loads(state.read_text())
    if saved["fingerprint"] != identity:
        raise ValueError(
            f"{state} is the progress of another evaluation (other model, images, eps, batch size, seed or version); "
            "give another --output_dir, or --overwrite to start anew"
        )
    return Progress(**saved)


def _save(state: Path | None, progress: Progress) -> None:
    if state is not None:
        write_atomically(state, json.dumps(asdict(progress)))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters without requires_grad meanwhile: FAB calls backward(), which would fill their `.grad`."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
