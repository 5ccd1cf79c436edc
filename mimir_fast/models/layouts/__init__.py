"""The layouts of files: one a file, found by itself.

A layout reader knows how somebody names the tensors of a model, what else in the file and beside it tells of that
model, and what of it is no part of the function. To add one, write a file in this folder that calls
`register(Layout(…))`; nothing else has to change.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from mimir_fast.models.facts import Facts
from mimir_fast.models.parts import Part
from mimir_fast.registry import Registry


@dataclass(frozen=True)
class Read:
    """What a reader made of a part.

    Attributes:
        tensors: under our names.
        facts: what the file says beside them.
        left_out: name in the file → why it is no part of the function.
        taken: what stood beside the encoder and is among the tensors, by its name there.
        hint: what is known of files of this layout, though this one does not say it.
    """

    tensors: dict[str, Tensor]
    facts: Facts = field(default_factory=Facts)
    left_out: dict[str, str] = field(default_factory=dict)
    hint: str = ""
    taken: Collection[str] = ()


@dataclass(frozen=True)
class Layout:
    """One way of writing a model down.

    Attributes:
        name: as it is looked up.
        title: as it is printed.
        recognise: whether a part is written so.
        read: the part under our names. Raises WeightsError for what we have no model for.
        anchors: a tensor of every such model, by which it is found under any prefix; the families' own are known.
        fallback: tried when no other layout recognises the part.
    """

    name: str
    title: str
    recognise: Callable[[Part], bool]
    read: Callable[[Part], Read]
    anchors: tuple[str, ...] = ()
    fallback: bool = False


LAYOUTS: Registry[Layout] = Registry("layout", __name__)


def register(layout: Layout) -> None:
    """Add a layout.

    Raises:
        ValueError: its name is taken.
    """
    LAYOUTS.add(layout.name, layout)


def find_layout(part: Part) -> Layout:
    """The layout of a part."""
    known = LAYOUTS.all().values()
    found = [layout for layout in known if not layout.fallback and layout.recognise(part)]
    return (found or [layout for layout in known if layout.fallback])[0]


def all_anchors() -> set[str]:
    """Names of tensors by which an encoder is found under any prefix, beside the families' own."""
    return {anchor for layout in LAYOUTS.all().values() for anchor in layout.anchors}
