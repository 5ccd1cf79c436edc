"""What attacks one after the other on a shard know so far: all that is needed to go on after a kill, in a JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.evaluation.journal import OtherMeasurementError
from mimir_fast.evaluation.measure import UNBROKEN


@dataclass
class AttackProgress:
    """The part that every such sequence has.

    Attributes:
        fingerprint: of what the numbers depend on.
        broken_by: an image → the attack that broke it, `clean` where none was needed, `none` where none has.
        entered: the images not broken when the attack in progress began: its batches are cut from them.
        attack: number of the attack in progress.
        batch: its next batch.
        seconds: an attack → time spent.
    """

    fingerprint: str
    broken_by: list[str] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    attack: int = 0
    batch: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, state: Path | None, identity: str, other: str) -> Self:
        """That of a file, or of the beginning.

        Args:
            other: what a file with another fingerprint is the progress of, in words.
        Raises:
            OtherMeasurementError: it is that of another evaluation.
        """
        if state is None or not state.exists():
            return cls(identity)
        found = cls(**json.loads(state.read_text()))
        if found.fingerprint != identity:
            raise OtherMeasurementError(
                f"{state} is the progress of {other}; give another --output_dir, or --overwrite to start anew"
            )
        return found

    def save(self, state: Path | None) -> None:
        """Write it where `load` finds it; None keeps nothing."""
        if state is not None:
            write_text(state, json.dumps(asdict(self)))

    def remaining(self) -> list[int]:
        """The images that no attack has broken so far."""
        return [i for i, name in enumerate(self.broken_by) if name == UNBROKEN]
