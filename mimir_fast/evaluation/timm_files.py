"""Weights from a file for a model of timm, opened by our own reader: older versions of timm's unpickle anything."""

import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.beside import look_beside, refuse_unknown
from mimir_fast.models.facts import Facts, in_unit_range
from mimir_fast.models.layouts.timm import without_derived
from mimir_fast.models.normalization import Statistics, from_file, pair
from mimir_fast.models.opening import open_file
from mimir_fast.models.parts import choose, find_parts, other_names


def fill(model: nn.Module, path: Path, name: str, wanted: str = "") -> tuple[Statistics | None, list[str]]:
    """Load a file into timm's model `name`: (the normalisation that the file says, notes for the report).

    Args:
        wanted: of a file with several models, which.
    Raises:
        WeightsError: unreadable, it wants to create objects other than tensors, it does not fit the model, or there is
            more in it that may change the function.
    """
    opened, own = open_file(path), model.state_dict()
    # A name that no longer name of the same model ends in, so that the prefix in front of it is the file's.
    anchor = next(n for n in own if not any(other.endswith("." + n) for other in own))
    try:
        part = choose(found := find_parts(opened.content, {}, [anchor], str(path)), "auto", wanted, str(path))
    except WeightsError as error:
        if "holds no" not in str(error):
            raise
        raise WeightsError(f"{path} does not fit timm's {name}: there is no {anchor} in it") from error
    around = look_beside(part.around, part.others, has_head=True)
    refuse_unknown(around.unknown, str(path))
    notes = [f"the file holds several models: {'.'.join(part.path) or 'the outer one'} is judged"]
    notes = notes if other_names(found, part) else []
    tensors, _ = without_derived(part.tensors)
    if _misfits(tensors, own):
        # timm's own renaming and resizing of older files.
        renew = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        try:
            tensors = renew(dict(tensors), model) if renew is not None else tensors
        except Exception:  # made for the files of one model; on others it raises anything
            tensors = dict(tensors)
    if misfits := _misfits(tensors, own):
        raise WeightsError(f"{path} does not fit timm's {name}: {misfits}")
    model.load_state_dict(tensors)
    said = from_file(None, opened.metadata) or around.statistics
    facts, scaled = in_unit_range(Facts() if said is None else Facts(mean=said[0], std=said[1]))
    return pair(facts.mean, facts.std), notes + [scaled] * bool(scaled)


def _misfits(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What does not fit, in words; empty where all does."""
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    unknown = [n for n in tensors if n not in own]
    others = [n for n in own if n in tensors and tensors[n].shape != own[n].shape]
    heads = ("head.", "fc.", "classifier.", "head_dist.", "fc_norm.", "norm.", "last_linear.")
    words = []
    if missing and all(n.startswith(heads) for n in missing):
        words.append(
            f"it has no classification head ({missing[-1]}), so it is a pre-trained encoder: fine-tune it first"
        )
    elif missing:
        words.append(f"{len(missing)} tensors are missing ({', '.join(missing[:3])})")
    if others and all(n.startswith(heads) for n in others):
        words.append(f"it has {len(tensors[others[0]])} classes, wanted {len(own[others[0]])} as the data has")
    elif others:
        n = others[0]
        words.append(
            f"{n} is {tuple(tensors[n].shape)} there, {tuple(own[n].shape)} in the model ({len(others)} in all)"
        )
    if unknown:
        words.append(f"{len(unknown)} are unknown ({', '.join(unknown[:3])})")
    return "; ".join(words)
