"""Evaluation: attacks, gradient-masking checks and the report. `run.py` puts them together.

    from mimir_fast.evaluation import RobustAccuracy, evaluate     # of a model and images in memory

Importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimir_fast.evaluation.given import evaluate
    from mimir_fast.evaluation.metric import RobustAccuracy

__all__ = ["RobustAccuracy", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from mimir_fast.evaluation.given import evaluate

        return evaluate
    if name == "RobustAccuracy":
        from mimir_fast.evaluation.metric import RobustAccuracy

        return RobustAccuracy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
