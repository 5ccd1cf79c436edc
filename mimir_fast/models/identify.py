"""Which model weights are of: what their tensors show, what their file says of the rest, and what the user says first.

What nobody says is assumed, and stands in the report. Where tensors fit images of several sizes, nothing is guessed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mimir_fast.models.beside import refuse_unknown
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.facts import Asked, size_said
from mimir_fast.models.families import (
    Architecture,
    Family,
    all_families,
    find_family,
    informed,
    recognise,
    rival_of,
    settled,
    why_not,
)
from mimir_fast.models.load_report import FIXED
from mimir_fast.models.normalization import Normalizer
from mimir_fast.models.options import option_texts, typed_options
from mimir_fast.models.weight_files import Weights, WeightsError
from mimir_fast.sizes import Size, said, shown, typed
from mimir_fast.validation import counted

# Part of a tensor's name → what to do about it.
_HINTS = {
    ".lora_": ": merge the adapters into the weights first (PEFT's merge_and_unload)",
    "parametrizations": ": remove the parametrisation first (torch.nn.utils.parametrize.remove_parametrizations)",
    "_flat_param": ": save it with FULL_STATE_DICT",
    "weight_scale": ": it is quantised, use the weights it was made of",
    "q_bias": " (BEiT, EVA, Data2Vec): no family of ours has biases of queries and values alone",
}


def infer_architecture(
    weights: Weights, options: Sequence[str] = (), image_size: Size | None = None, into: Encoder | None = None
) -> tuple[Architecture, int | None]:
    """The encoder, and the classes of the head if there is one: from the tensors, and from what the file says.

    Args:
        options: what no tensor shows, as it is typed: heads=12, eps=1e-5; goes before what was saved with the weights.
        image_size: of the images that the model will take: where the weights do not say theirs, this is it if it fits
            their tensors.
        into: the encoder that the weights initialise. Its size is theirs only where no square has as many patches.
            Without one, the function is wanted as it was.
    Raises:
        WeightsError: no encoder of ours has such tensors, they are of images of several sizes and nobody says which,
            the file says something that its encoder here cannot do, or (without `into`) something beside the tensors,
            or another size of images than theirs, may change the function.
        ValueError: options that the family does not know.
    """
    if into is None:
        refuse_unknown(weights.unknown, weights.origin)
    texts, tensors = (*weights.asked.options, *options), weights.tensors
    architecture = recognise(tensors)
    if architecture is None and (reason := why_not(tensors)):
        hint = next((words for mark, words in _HINTS.items() if mark in reason), "")
        raise WeightsError(
            f"{weights.origin} ({outline(tensors)}) is no encoder of ours, or incomplete, because of {reason}{hint}"
        )
    if architecture is None:
        there_are = "; ".join(
            f"{family.title}: {', '.join(f'{name} ({words})' for name, words in family.sizes.items())}"
            for family in all_families().values()
        )
        raise WeightsError(f"{weights.origin} ({outline(tensors)}) is no encoder of ours. Those are {there_are}")
    family = find_family(architecture.family)
    given = typed_options(texts, family.options, family.title)
    bare = given.get("no_prefix_positions") or (into is not None and into.options.get("no_prefix_positions"))
    near = image_size if into is None else into.image_size
    architecture = _of_size(weights, architecture, near, bare=bool(bare), sure=into is None)
    known = known_of(weights, family)
    for name, value in family.fixed.items():
        if name not in family.unseen and known.get(name, value) != value:
            raise WeightsError(f"{weights.origin} says {name} {known[name]}, our {family.title} has {value}")
    try:
        architecture = informed(architecture, known | given)
        if "norm_before_pool" in family.options and {"norm.weight", "head.weight"} <= tensors.keys():
            architecture = _with(architecture, {"norm_before_pool": pool_of(weights, architecture) == "avg"})
        wanted = _with(architecture, given) if given else architecture
    except ValueError as error:
        read = ", ".join(f"{n} {known[n]}" for n in family.unseen if n in known and n not in given and n in str(error))
        who = f": the file says {read}, and --options (evaluate, probe, export, hub) otherwise" if read else ""
        raise WeightsError(f"{weights.origin}: {error}{who}") from error
    if wanted != architecture:
        raise WeightsError(
            f"{weights.origin}: its tensors say {' '.join(option_texts(architecture.options)) or 'no options'}, not "
            f"{' '.join(texts)}: give only what they do not show ({', '.join(family.unseen) or 'nothing here'})"
        )
    head = tensors.get("head.weight")
    return architecture, None if head is None else len(head)


def _with(architecture: Architecture, options: Mapping[str, Any]) -> Architecture:
    return settled(replace(architecture, options={**architecture.options, **options}))


def _of_size(weights: Weights, plain: Architecture, near: Size | None, *, bare: bool, sure: bool) -> Architecture:
    """The architecture for the size that the user says, else the weights, else `near`, if it fits the tensors.

    Args:
        plain: without a size.
        bare: positions are for patches alone.
        sure: that `near` is the size where it fits, though a square has as many patches.
    """
    asked, saved, family = weights.asked.image_size, saved_size(weights), find_family(plain.family)
    if not family.image_size_in_tensors or (family.sized is None and isinstance(saved, tuple)):
        return replace(plain, image_size=asked or saved or near or plain.image_size)
    told = asked or saved or near
    if family.size_of_window and sure and told is not None and _fitting(weights, told) is None:
        raise WeightsError(_of_other_windows(weights, family, plain.image_size, told))
    fits = [found for size in (asked, saved) if (found := _fitting(weights, size)) is not None]
    if fits and (asked is None or fits[0].image_size == asked):
        return fits[0]
    positions = weights.tensors.get("pos_embed")
    rows = "" if positions is None else f" (pos_embed is {tuple(positions.shape)})"
    if asked is not None:
        raise WeightsError(f"{weights.origin} is not of images of {said(asked)} pixels{rows}: say another size")
    square, rival = isinstance(plain.image_size, int), None if bare else rival_of(weights.tensors)
    # Patches without positions for the prefix are not believed in where the model to be initialised has these.
    found = None if rival and near == plain.image_size and not sure else _fitting(weights, near)
    if found is not None:
        if sure or not square or found.image_size == plain.image_size or found.options != plain.options:
            return found
        raise WeightsError(
            f"{weights.origin} is of images of {said(plain.image_size)} pixels or of {said(found.image_size)}, which "
            f"have as many patches, and no tensor tells which: {_SAY_SIZE}"
        )
    if rival is not None:
        raise WeightsError(
            f"{weights.origin} is of images of {said(plain.image_size)} pixels with positions for patches alone, or of "
            f"{said(rival.image_size)} with one for the cls token too{rows}, and no tensor tells which: {_SAY_SIZE}"
        )
    if not square:
        raise WeightsError(
            f"{weights.origin} is of images that are no squares{rows}, and no tensor tells their height and width: "
            f"{_SAY_SIZE}"
        )
    return plain


def _of_other_windows(weights: Weights, family: Family, seen: Size, told: Size) -> str:
    known = weights.asked.image_size is None and saved_size(weights) is not None
    then = f"; if it was made for {shown(seen)}, say so: {_size_flags(typed(seen))}"
    return (
        f"{weights.origin}: one window of its last stage sees {shown(seen)} pixels of images of {shown(told)}, in our "
        f"{family.title} it sees the whole image{'' if known else then}"
    )


def _fitting(weights: Weights, size: Size | None) -> Architecture | None:
    """The architecture for images of that size, or None where it does not fit the tensors."""
    found = None if size is None else recognise(weights.tensors, size)
    return found if found is not None and found.image_size == size else None


def _size_flags(size: str) -> str:
    """What to type, for commands whose images are of the weights' size."""
    return f"--data.image_size {size} (evaluate, probe), --image_size {size} (export, hub)"


_SAY_SIZE = (
    f"give the size that it was trained with: {_size_flags('HEIGHT WIDTH')}, --init_image_size HEIGHT WIDTH (finetune, "
    "pretrain)"
)


def pool_of(weights: Weights, architecture: Architecture) -> str:
    """What the head of these weights looks at, `avg` or `cls`: as the user says, else the file, else the tensors.

    Another word is of a pooling that a file names and no classifier of ours has.
    """
    family, tensors = find_family(architecture.family), weights.tensors
    if (said := said_pool(weights, family)) is not None:
        return said
    late = "fc_norm.weight" in tensors or "norm_before_pool" in architecture.options or family.norm_before_pool
    return "cls" if "cls_token" in tensors and not late else "avg"


def said_pool(weights: Weights, family: Family) -> str | None:
    """The same as far as user or file say it."""
    if weights.asked.pool != "auto":
        return weights.asked.pool
    if "head_dist.weight" in weights.tensors:  # a second head, which reads the second class token
        return "cls"
    saved = _saved_model(weights).get("global_pool")
    return family.pool if saved == "auto" else saved or weights.facts.pool


def _saved_model(weights: Weights) -> Mapping[str, Any]:
    """The options of the model that our runs and files keep."""
    return (weights.config or {}).get("model") or {}


def is_run(weights: Weights) -> bool:
    """Whether a run of ours wrote them, so that nothing is assumed; not a file of somebody's that we exported."""
    return bool(_saved_model(weights).keys() - {"options", "global_pool"})


def record_of(weights: Weights, architecture: Architecture) -> dict[str, Any]:
    """The configuration that a file of these weights keeps: their own, and what is known that no tensor shows."""
    config, asked = weights.config or {}, weights.asked
    if is_run(weights) and asked == Asked():
        return config
    family, model = find_family(architecture.family), dict(_saved_model(weights))
    known = known_of(weights, family) | typed_options(asked.options, family.options, family.title)
    model["options"] = option_texts(
        {n: known[n] for n in family.unseen if n in known} | dict(architecture.options)
    )  # fmt: skip
    if "head.weight" in weights.tensors and (asked.pool != "auto" or weights.facts.pool):
        model["global_pool"] = pool_of(weights, architecture)
    sure = asked.image_size or saved_size(weights) or not isinstance(architecture.image_size, int)
    data = (config.get("data") or {}) | ({"image_size": architecture.image_size} if sure else {})
    pixels = weights.facts.norm_pixels
    objective = (config.get("objective") or {}) | ({} if pixels is None else {"norm_pix_loss": pixels})
    more = {name: found for name, found in (("data", data), ("objective", objective)) if found}
    return {**config, "model": model, **more}


def known_of(weights: Weights, family: Family) -> dict[str, Any]:
    """What the weights say of what the tensors of their family do not show, by name."""
    saved = typed_options(_saved_model(weights).get("options", ()), family.options, family.title)
    known, norm = dict(weights.facts.known()) | saved, weights.tensors.get("blocks.0.attn.q_norm.weight")
    if norm is not None and "heads" in family.unseen:  # as wide as a head
        known["heads"] = weights.tensors["blocks.0.attn.qkv.weight"].shape[1] // len(norm)
    return known


def saved_size(weights: Weights) -> Size | None:
    """Size of the images that the weights say they were trained on."""
    said = ((weights.config or {}).get("data") or {}).get("image_size")
    return weights.facts.image_size if said is None else size_said(said)


def outline(tensors: Mapping[str, Tensor]) -> str:
    """Width, depth and patch of a plain vision transformer, for messages; the number of tensors of anything else."""
    depth = 1 + max((int(n.split(".")[1]) for n in tensors if re.match(r"blocks\.\d+\.", n)), default=-1)
    first = tensors.get("patch_embed.proj.weight")
    if first is None or first.ndim != 4 or not depth:
        return counted(len(tensors), "tensor")
    return f"width {first.shape[0]}, depth {depth}, patch {first.shape[-1]}, {first.shape[1]} channels"


def assumed_of(model: nn.Module, weights: Weights, family: Family | None, pool: str | None) -> list[str]:
    """What the model has and neither the tensors nor the file nor the user say.

    Args:
        pool: what a head from the weights looks at; None where there is none.
    """
    encoder, facts = getattr(model, "encoder", model), weights.facts
    options: Mapping[str, Any] = getattr(encoder, "options", {})
    texts = (*weights.asked.options, *_saved_model(weights).get("options", ()))
    told = {text.partition("=")[0] for text in texts} | {*options}
    told |= {name for name, _ in facts.known()} if family is None else known_of(weights, family).keys()
    unseen = () if family is None else family.unseen
    found = []
    if "heads" in unseen and "heads" not in told and (heads := getattr(encoder, "num_heads", None)):
        found.append(f"{heads} heads")
    if "eps" not in told and (eps := _eps_of(model)) is not None:
        found.append(f"eps {eps:g}" + FIXED * ("eps" not in unseen))
    if "gelu" not in told:
        found.append("GELU erf" + FIXED * ("gelu" not in unseen))
    if "tokens_norm" in unseen and "tokens_norm" not in told:
        found.append("tokens_norm true")
    told |= {"pool"} if weights.asked.pool != "auto" or "global_pool" in _saved_model(weights) else set()
    if pool is not None and "pool" not in told:
        found.append(f"pooling {pool}")
    normalizer = getattr(model, "normalizer", None)
    if facts.mean is None and isinstance(normalizer, Normalizer) and not normalizer.changes:
        found.append("normalisation none")
    return found


def assumed_size(weights: Weights, architecture: Architecture, near: Size | None = None) -> list[str]:
    """The size of the images in words, where neither the weights nor the user say it."""
    known = is_run(weights) or near is not None or weights.asked.image_size or saved_size(weights)
    return [] if known else [f"images of {said(architecture.image_size)}"]


def _eps_of(model: nn.Module) -> float | None:
    return next((part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)), None)


def overridden(weights: Weights, architecture: Architecture) -> list[str]:
    """A line for each thing of which the user says something else than the weights."""
    family = find_family(architecture.family)
    given, known = typed_options(weights.asked.options, family.options, family.title), known_of(weights, family)
    lines = [
        f"{name}={value} as asked, in place of {name}={known[name]} that the weights say"
        for name, value in given.items()
        if name in family.unseen and known.get(name, value) != value
    ]
    # A run of ours keeps only what differs from the defaults, and so does an architecture.
    unlike = _with(architecture, given).options if is_run(weights) else {}
    silent = [name for name in given if name in unlike and name in family.unseen and name not in known]
    lines += [f"{name}={given[name]} as asked, in place of what the run was trained with" for name in silent]
    if (asked := weights.asked.image_size) and (size := saved_size(weights)) and asked != size:
        lines.append(f"images of {said(asked)} pixels as asked, in place of {said(size)} that the weights say")
    told = pool_of(replace(weights, asked=Asked()), architecture)
    if weights.asked.pool not in ("auto", told) and (is_run(weights) or weights.facts.pool):
        lines.append(f"pooling {weights.asked.pool} as asked, in place of {told} that the weights say")
    return lines
