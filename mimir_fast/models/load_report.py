"""What became of a file of weights: said in one place, printed by every command and kept beside its results."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.validation import counted

FILE_NAME = "weights.json"
FIXED = " (in all of ours)"
"""Marks an assumption that no flag changes."""
_FLAGS = {
    "heads": "--options heads=12", "eps": "--options eps=1e-5", "GELU": "--options gelu=tanh",
    "tokens_norm": "--options tokens_norm=false", "pooling": "--global_pool avg", "normalisation": "--mean … --std …",
    "images": "--image_size",
}  # fmt: skip


@dataclass
class LoadReport:
    """What was loaded into a model, by tensor name.

    Attributes:
        origin: what was read.
        layout: in whose way it is written.
        loaded: names under which they are in the model's own files.
        reasons: name → why it is not in the model: a decoder, another head.
        resized: with old and new shape.
        fresh: in the model, not in the file: left as initialised.
        assumed: what neither tensors nor file say.
        notes: what a user should know beside.
    """

    origin: str
    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> list[str]:
        """Names that are in the file and not in the model."""
        return list(self.reasons)

    @property
    def assumption(self) -> str:
        """What is assumed, as a line."""
        return f"assumed  {', '.join(self.assumed)}: the file does not say"

    def by_reason(self) -> dict[str, list[str]]:
        """Reason → the names that were skipped for it."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            groups.setdefault(reason, []).append(name)
        return groups

    def __str__(self) -> str:
        layout = f" (layout: {self.layout})" if self.layout else ""
        lines = [
            f"initialised from {self.origin}{layout}",
            f"  loaded   {counted(len(self.loaded), 'tensor')}",
        ]
        if self.resized:
            lines.append(f"  resized  {', '.join(self.resized)}")
        lines += [f"  skipped  {summary(names)}: {reason}" for reason, names in self.by_reason().items()]
        if self.fresh:
            lines.append(f"  fresh    {', '.join(self.fresh) if len(self.fresh) <= 8 else summary(self.fresh)}")
        if self.assumed:
            free = [one for one in self.assumed if not one.endswith(FIXED)]
            flags = [flag for word, flag in _FLAGS.items() if any(word in one.split() for one in free)]
            said = ", ".join(flags).replace(", --options", "")
            lines += [f"  {self.assumption}"]
            lines += (
                [f"           to say otherwise: {said} (in training --model.options and so on, --init_image_size)"]
                if said
                else []
            )
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])

    def save(self, folder: Path) -> Path:
        """Write it as weights.json into a folder that is there, and return the path."""
        path = folder / FILE_NAME
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")
        return path

    def as_dict(self) -> dict[str, Any]:
        """As weights.json has it: what was skipped by its reasons."""
        return {name: value for name, value in vars(self).items() if name != "reasons"} | {"skipped": self.by_reason()}

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The report that lies in a folder; None where there is none, or it is damaged."""
        try:
            found = json.loads((folder / FILE_NAME).read_text())
            reasons = {name: reason for reason, names in found.pop("skipped").items() for name in names}
            return cls(**found, reasons=reasons)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def summary(names: list[str]) -> str:
    """`decoder_blocks.* (24)` instead of 24 names."""
    groups: dict[str, int] = {}
    for name in names:
        head, dot, _ = name.partition(".")
        groups[head + (".*" if dot else "")] = groups.get(head + (".*" if dot else ""), 0) + 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups.items())
