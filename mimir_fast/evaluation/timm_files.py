"""What timm says of a model beside its code: how images are prepared for it, and weights in a file.

The files are opened by our own reader: older versions of timm's unpickle anything.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.beside import look_beside, refuse_unknown
from mimir_fast.models.facts import Facts, facts_of_file, in_unit_range
from mimir_fast.models.layouts.timm import facts_beside, facts_of_model, without_derived
from mimir_fast.models.normalization import Statistics, from_file, pair
from mimir_fast.models.opening import open_file
from mimir_fast.models.parts import choose, find_parts, other_names
from mimir_fast.sizes import as_size
from mimir_fast.validation import counted


def made_for_timm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How timm prepares images for a model, from its `pretrained_cfg`: `image_size` and fields of `images.Fitting`.

    What the configuration leaves open is as in `timm.data.resolve_data_config`.
    """
    mode, mean = settings.get("crop_mode") or "center", settings.get("mean") or (0.485, 0.456, 0.406)
    made = {
        "crop": settings.get("crop_pct") or 0.875,
        "interpolation": settings.get("interpolation") or "bicubic",
        "mode": mode if mode in ("squash", "border") else "center",
    }
    made |= {"image_size": as_size(size[-2:])} if (size := settings.get("input_size")) else {}
    return made | ({"fill": tuple(round(255 * v) for v in mean)} if mode == "border" else {})


def fill(model: nn.Module, path: Path, name: str, part: str = "") -> tuple[Statistics | None, list[str]]:
    """Load a file into timm's model `name`: (the normalisation that the file says, notes for the report).

    Args:
        part: of a file with several models, which.
    Raises:
        WeightsError: unreadable, it wants to create objects other than tensors, it does not fit the model, or there is
            more in it that may change the function.
    """
    opened, own = open_file(path), model.state_dict()
    # A name that no longer name of the same model ends in, so that the prefix in front of it is the file's.
    anchor = next(n for n in own if not any(other.endswith("." + n) for other in own))
    try:
        beside = {**opened.configs, "metadata": opened.metadata}
        chosen = choose(found := find_parts(opened.content, beside, [anchor], str(path)), "auto", part, str(path))
    except WeightsError as error:
        if "holds no" not in str(error):
            raise
        raise WeightsError(f"{path} does not fit timm's {name}: there is no {anchor} in it") from error
    around = look_beside(chosen.around, chosen.others, has_head=True)
    refuse_unknown(around.unknown, str(path))
    notes = [f"the file holds several models: {'.'.join(chosen.path) or 'the outer one'} is judged"]
    notes = notes if other_names(found, chosen) else []
    tensors, _ = without_derived(chosen.tensors)
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
    try:
        facts, known = facts_beside(replace(chosen, tensors=tensors)), facts_of_model(model)
    except WeightsError:  # its function is none of ours, which is no fault of timm's own model
        facts = known = Facts()
    for fact in ("heads", "eps", "gelu", "pool", "tokens_norm"):
        told, has = getattr(facts, fact), getattr(known, fact)
        if None not in (told, has) and told != has:
            raise WeightsError(
                f"{path} says {fact} {told}, timm's {name} has {has}: give the file alone (--checkpoint)"
            )
    if (said := from_file(None, opened.metadata) or around.statistics) is not None:
        facts = Facts(mean=said[0], std=said[1])
    facts, scaled = in_unit_range(facts.over(facts_of_file(chosen.beside)))
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
        words.append(f"{counted(len(missing), 'tensor is', 'tensors are')} missing ({', '.join(missing[:3])})")
    if others and all(n.startswith(heads) for n in others):
        classes = counted(len(tensors[others[0]]), "class", "classes")
        words.append(f"it has {classes}, wanted {len(own[others[0]])} as the data has")
    elif others:
        n = others[0]
        words.append(
            f"{n} is {tuple(tensors[n].shape)} there, {tuple(own[n].shape)} in the model ({len(others)} in all)"
        )
    if unknown:
        words.append(f"{counted(len(unknown), 'is', 'are')} unknown ({', '.join(unknown[:3])})")
    return "; ".join(words)
