"""Names of timm's models, and what a misspelt one may have meant."""

import difflib
from collections.abc import Iterable

from mimir_fast.checkpoints.reading import WeightsError


def check_timm_name(name: str) -> None:
    """Refuse what timm has no model of; tags such as `.augreg_in21k` are not looked at.

    Raises:
        WeightsError: naming the nearest.
    """
    import timm

    if not timm.is_model(plain := name.partition(".")[0]):
        near = nearest_names(plain, timm.list_models())
        meant = f"; did you mean {', '.join(near)}?" if near else ": timm.list_models() names all"
        raise WeightsError(f"timm has no model {plain!r}{meant}")


def nearest_names(name: str, known: Iterable[str], most: int = 5) -> list[str]:
    """The known names whose first words are the most like `name`: vit_tny is a slip for vit_tiny_patch16_224, though
    convit_tiny has more letters in common with it."""
    count = name.count("_") + 1
    starts: dict[str, list[str]] = {}
    for other in known:
        starts.setdefault("_".join(other.split("_")[:count]), []).append(other)
    close = difflib.get_close_matches(name, list(starts), n=1)
    return sorted(starts[close[0]])[:most] if close else []
