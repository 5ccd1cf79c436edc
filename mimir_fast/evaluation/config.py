"""The configuration of an evaluation: one dataclass of the common options and of the options of every topic."""

from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

from mimir_fast.evaluation.options import CommonOptions
from mimir_fast.evaluation.topic import all_topics


def _joined(base: type, options: Sequence[type]) -> Any:
    """A dataclass with the fields of all: those of `base` first, then those of each topic. Each checks its own."""
    parts = (base, *options)

    def check(self: Any) -> None:
        for part in parts:
            if hasattr(part, "__post_init__"):
                part.__post_init__(self)

    def idle(self: Any) -> dict[str, str]:
        """Options that do nothing as the others are."""
        found: dict[str, str] = {}
        for part in parts:
            found |= part.idle(self) if hasattr(part, "idle") else {}
        return found

    namespace = {
        "__doc__": "Evaluate the robustness of any classifier and write one report.",
        "__module__": __name__, "__post_init__": check, "idle": idle,
    }  # fmt: skip
    # The fields of later bases come first.
    return make_dataclass("EvaluateConfig", [], bases=tuple(reversed(parts)), namespace=namespace)


def _topic_options() -> list[type]:
    return [topic.options for topic in all_topics() if topic.options is not None]


if TYPE_CHECKING:

    class EvaluateConfig(CommonOptions):
        """What an evaluation is asked to do: `CommonOptions`, and the options of the package's topics."""

        def __init__(self, checkpoint: str, *args: Any, **options: Any) -> None: ...

else:
    EvaluateConfig = _joined(CommonOptions, _topic_options())


def config_type() -> type[EvaluateConfig]:
    """`EvaluateConfig`, with the options of those topics too that were registered from outside of the package."""
    added = [options for options in _topic_options() if not issubclass(EvaluateConfig, options)]
    return _joined(EvaluateConfig, added) if added else EvaluateConfig
