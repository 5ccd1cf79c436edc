"""What a topic of the report is, and the registry of topics.

A topic is one file in `topics/`: its options, how much each suite does of it, its measurements, its numbers, its part
of the page. The file registers itself with `register(Topic(…))`, from inside or from outside of the package.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mimir_fast.attacks.pgd import NO_CLASS
from mimir_fast.evaluation.images import ImageSets
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.options import CommonOptions
from mimir_fast.registry import Registry

Numbers = dict[str, Any]
"""What a topic found; JSON-able."""

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """What is known before anything is measured; topics plan their measurements from it.

    Attributes:
        config: the common options; `options_of` gives a topic its own.
        num_images: evaluated ones.
        classes: their names, one a class.
        has_features: the model shows its features (`forward_features`).
        has_weights: the model's weights can be moved (no exported program, no plain function).
        load_model: loads another classifier, named as for --checkpoint, and looks at its answers to a few images. What
            is loaded in a topic's `check` is part of what the evaluation depends on.
        trial: two of the evaluated images, on which `Topic.check` tries what it was given; None: nothing is tried.
        has_places: some of the model's layers can be looked at, and their outputs are maps or tokens.
    """

    config: CommonOptions
    num_images: int
    classes: tuple[str, ...]
    has_features: bool
    has_weights: bool
    load_model: Callable[[str], nn.Module]
    trial: ImageSets | None = None
    has_places: bool = False
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def class_name(self, number: int) -> str:
        """The name of a predicted class; that of NO_CLASS says what it is."""
        return "not finite" if number == NO_CLASS else self.classes[number]

    def subset(self, count: int) -> str:
        """Name of the set of `count` images at equal distances, of all where there are no more."""
        return f"few:{min(count, self.num_images)}"

    def keep(self, name: str) -> Path | None:
        """Folder for the attacked images of a measurement; None where they are not wanted."""
        return self.config.folder / "adversarial" / name if self.config.save_adversarial else None

    def once(self, name: str, load: Callable[[], T]) -> T:
        """What `load` returns, loaded when it is first asked for, such as another model."""
        if name not in self._loaded:
            self._loaded[name] = load()
        loaded: T = self._loaded[name]
        return loaded


@dataclass(frozen=True)
class Column:
    """An accuracy that stands in a row with others: in the row to quote, and in comparisons of several models.

    Attributes:
        key: columns of one key are one column of a comparison; "" keeps it out of comparisons.
        label: head of the column.
        accuracy: 0 … 1.
        total: images it is of, where these are fewer than all; else None.
    """

    key: str
    label: str
    accuracy: float
    total: int | None = None


@dataclass(frozen=True)
class Topic:
    """A topic of the report.

    Attributes:
        name: key of its numbers in results.json ("sections"), and of its section on the page.
        title: heading of the section.
        measurements: setup → the measurements it needs, [] where it does not apply.
        summarize: (setup, its measurements, all finished records) → its numbers, None where it does not apply. A list
            under "notes" is put at the top of the page.
        render: numbers → HTML; "" for none.
        order: topics are measured and shown in ascending order; the package's end at 130.
        options: dataclass, whose fields are options of the command line; its `__post_init__` may refuse values.
        check: opens whatever the options name and tries it on `Setup.trial`; raises ValueError, ImportError or
            FileNotFoundError for what does not fit, before anything is measured.
        identity: setup → what the numbers depend on beside the parameters of the measurements; JSON-able.
        columns: numbers → accuracies that stand beside those of other topics.
        compare: [(model's name, numbers)] → HTML of several models' numbers, "" for none.
    """

    name: str
    title: str
    measurements: Callable[[Setup], Sequence[Measurement]]
    summarize: Callable[[Setup, Sequence[Measurement], Records], Numbers | None]
    render: Callable[[Numbers], str]
    order: int = 1000
    options: type | None = None
    check: Callable[[Setup], None] = lambda setup: None
    identity: Callable[[Setup], dict[str, Any]] = lambda setup: {}
    columns: Callable[[Numbers], Sequence[Column]] = lambda numbers: ()
    compare: Callable[[Sequence[tuple[str, Numbers]]], str] = lambda models: ""


TOPICS: Registry[Topic] = Registry("topic", f"{__name__.rpartition('.')[0]}.topics")


def register(topic: Topic) -> None:
    """Add a topic.

    Raises:
        ValueError: its name, or one of its options, is taken.
    """
    kinds = (CommonOptions, *(known.options for known in TOPICS.registered().values()))
    owners = {option.name: kind.__name__ for kind in kinds if kind for option in fields(kind)}
    for option in fields(topic.options) if topic.options else ():
        if option.name in owners:
            raise ValueError(f"topic {topic.name}: --{option.name} is an option of {owners[option.name]} already")
    TOPICS.add(topic.name, topic)


def all_topics() -> list[Topic]:
    """Every topic, in the order of the report."""
    return sorted(TOPICS.all().values(), key=lambda topic: topic.order)


def options_of(config: CommonOptions, kind: type[T]) -> T:
    """The configuration, seen as a topic's options; the defaults where it is older than the topic's registration."""
    return config if isinstance(config, kind) else kind()
