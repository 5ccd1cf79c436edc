"""The methods by name, for pre-training and for fine-tuning: their files register themselves, this one finds them.

A run names neither a method nor an option of one: what it has to know, `Objective` and `MethodEntry` say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.registry import Registry
from mimir_fast.sizes import Size

Stage = Literal["pretrain", "finetune"]
DEFAULT: Mapping[Stage, str] = {"pretrain": "mimir", "finetune": "pgd"}
"""The method where none is named."""


@dataclass
class Objective:
    """The options of a method; a subclass adds its own, and says here what they ask of images, model and ranks.

    Attributes:
        free_to_change: options (`a.b`) that change how fast a run is and not what it computes; a resumed run may have
            others.
    """

    free_to_change: ClassVar[frozenset[str]] = frozenset()

    def fit(self, image_size: Size) -> Self:
        """These options with those replaced by their defaults that make no sense for images of this size in pixels."""
        return self

    def check_images(self, image_size: Size, mask_unit: int) -> None:
        """Raises ValueError where the options do not fit images of this size with units of `mask_unit` pixels."""

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError for a model that cannot do what the options ask for."""

    def check_batches(self, micro_batch: int, accum_iter: int, ranks: int) -> str:
        """What a run should say of the sizes of its batches, or an empty string; raises ValueError for too small ones.

        Args:
            micro_batch: images of the smallest micro-batch, of which each rank accumulates `accum_iter` for a step.
        """
        return ""

    def derived(self, micro_batch: int, accum_iter: int, ranks: int) -> dict[str, int]:
        """What these options come to with batches of these sizes (as in `check_batches`): for a run's config.json."""
        return {}

    @property
    def needs_even_ranks(self) -> str:
        """The option that needs as many images on each rank, as `name=value`, or an empty string."""
        return ""


Pass = Callable[[], dict[str, Tensor]]
"""A training pass: → {"loss": scalar to minimise, other detached scalars}."""


class Method(Protocol):
    """What a run calls: the loss of a batch, and pictures of it."""

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar to minimise, other detached scalars}; `model` may be wrapped for data parallelism."""
        ...

    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """Rows of images (B, C, H, W) in [0, 1] by name, for the run's pictures."""
        ...


@runtime_checkable
class MethodOverBatches(Protocol):
    """A method whose loss is not a sum over micro-batches: it looks at all of a step before the first is trained on."""

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The training passes of a step, one for each micro-batch, to be called in this order."""
        ...


@runtime_checkable
class MethodWithState(Protocol):
    """A method that takes numbers from one step to the next, beside the weights: a checkpoint holds them."""

    def saved_state(self) -> dict[str, float]:
        """The numbers as JSON knows them, the same on all ranks. Collective."""
        ...

    def restore_state(self, state: dict[str, float], device: torch.device) -> None:
        """Go on from them; {} is a run that has not begun."""
        ...


def saved_state(method: Method) -> dict[str, float]:
    """That of any method: {} of one without. Collective."""
    return method.saved_state() if isinstance(method, MethodWithState) else {}


def restore_state(method: Method, state: dict[str, float], device: torch.device) -> None:
    """Undo `saved_state`; what a method without state is given is dropped."""
    if isinstance(method, MethodWithState):
        method.restore_state(state, device)


def passes_of(method: Method, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
    """The training passes of a step by any method, one for each micro-batch."""
    if isinstance(method, MethodOverBatches):
        return method.passes(model, batches, seed=seed, step=step)
    return [partial(method, model, batch, seed=seed, step=step) for batch in batches]


@dataclass(frozen=True)
class MethodEntry:
    """A method and what it needs.

    Attributes:
        name: as it is typed.
        stage: `pretrain` or `finetune`.
        config: dataclass of its options; they are its command line.
        build: config → method.
        note: one line for lists.
        decoder: the only decoder it works with, or "" for any.
        adapters: the model keeps norm layers and cls token twice.
        labels: the model gets a head, and the data must have labels.
        idle: options that it does not use → why, as in `validation.without`.
        as_published: options → the same as in the published numbers that recipes quote, where the defaults differ.
    """

    name: str
    stage: Stage
    config: type
    build: Callable[[Any], Method]
    note: str
    decoder: str = ""
    adapters: bool = False
    labels: bool = False
    as_published: Callable[[Any], Any] = lambda options: options
    idle: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A named choice for every point in which the texts and the code of a method's authors differ.

    Attributes:
        apply: options → options; raises ValueError for a method that has no such points.
        options: of the methods that have such points.
        positions: of the kept patches, in families where paper and code differ there too.
        micro_batch: options, name of the data → images that a rank works on at once, where an estimate depends on them
            and the authors' number is known; else None, which leaves the run's.
        exact: it promises the authors' numbers, so the precision `auto` is fp32.
    """

    name: str
    apply: Callable[[Any], Any]
    options: type = Objective
    positions: Literal["true", "official"] = "true"
    micro_batch: Callable[[Any, str], int | None] = lambda options, data: None
    exact: bool = False


_PACKAGE = __name__.rpartition(".")[0]
METHODS: Mapping[Stage, Registry[MethodEntry]] = {
    "pretrain": Registry("method", _PACKAGE), "finetune": Registry("method", _PACKAGE)
}  # fmt: skip
PRESETS: Registry[Preset] = Registry("preset", _PACKAGE)


def register(entry: MethodEntry) -> None:
    """Add a method.

    Raises:
        ValueError: its name is taken in its stage.
    """
    METHODS[entry.stage].add(entry.name, entry)


def all_methods(stage: Stage) -> dict[str, MethodEntry]:
    """Every method of a stage by name."""
    return METHODS[stage].all()


def find_method(stage: Stage, name: str) -> MethodEntry:
    """The method of that name.

    Raises:
        ValueError: there is none; the message suggests the nearest.
    """
    return METHODS[stage].find(name)


def convert(config: Any, wanted: type) -> Any:
    """`config` as options of another method: what differs from its default and exists there too is carried over."""
    if type(config) is wanted:
        return config
    own = {f.name: f for f in fields(config)}
    carried = {}
    for f in fields(wanted):
        if f.name in own and (value := getattr(config, f.name)) != _default(own[f.name]):
            theirs = _default(f)
            if theirs is MISSING or theirs is None or type(theirs) is type(value) or isinstance(value, (int, float)):
                carried[f.name] = value
    return wanted(**carried)


def _default(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default
