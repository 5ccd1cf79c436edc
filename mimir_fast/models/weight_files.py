"""Reading weights, whoever wrote them, without ever running code from the file.

    ours       a run folder, one of its checkpoints, or a .safetensors file written by mimir_fast.export
    others'    a .safetensors, .pth or .bin file, the index.json of several, a folder of Hugging Face's or of
               torch.distributed.checkpoint: in any layout that models/layouts has a reader for
    timm       `timm:NAME` for weights timm downloads

A file is opened (opening.py), the encoder that is meant is found in it (parts.py), and a layout reader puts its tensors
under our names and says what the file tells beside them.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mimir_fast.checkpoints.dcp import is_dcp
from mimir_fast.checkpoints.reading import (
    WeightsError,
    follow_best,
    read_meta,
    read_tensors,
    resolve_checkpoint,
    saved_tensors,
)
from mimir_fast.models.beside import look_beside
from mimir_fast.models.facts import Asked, Facts, facts_of_file, in_unit_range
from mimir_fast.models.families import all_families
from mimir_fast.models.layouts import all_anchors, find_layout
from mimir_fast.models.layouts.mimir_fast import config_of
from mimir_fast.models.layouts.timm import facts_of_model
from mimir_fast.models.lora import merge_lora
from mimir_fast.models.normalization import Statistics, check_statistics, from_file, is_none, none_of
from mimir_fast.models.opening import find_file, open_file, open_folder, weights_only
from mimir_fast.models.parts import WeightsChoice, choose, find_parts, other_names
from mimir_fast.models.timm_names import check_timm_name

__all__ = ["Weights", "WeightsChoice", "WeightsError", "read_weights"]


@dataclass
class Weights:
    """Named tensors and what is known of them.

    Attributes:
        tensors: name → CPU tensor, under our names.
        origin: what was read, for messages.
        config: the configuration saved with them (ours only).
        facts: what the writer says of the model beside the tensors.
        notes: what a user should know of these weights.
        layout: whose way of writing it is, as printed.
        left_out: name in the file → why it is no part of the function.
        unknown: names in the file, beside the encoder, of what may change the function.
        asked: what the user says of them, before all that they say.
    """

    tensors: dict[str, Tensor]
    origin: str
    config: dict[str, Any] | None = None
    facts: Facts = field(default_factory=Facts)
    notes: list[str] = field(default_factory=list)
    layout: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)

    @property
    def normalization(self) -> Statistics | None:
        """(mean, std) of `facts`."""
        return None if self.facts.mean is None or self.facts.std is None else (self.facts.mean, self.facts.std)

    def statistics(self, channels: int, asked: Statistics | None = None) -> Statistics:
        """(mean, std) of a model with these weights: as asked, else as the weights say, else none.

        Raises:
            WeightsError: not one number a channel, or what the weights say is no mean and deviation of images.
        """
        found = asked or self.normalization
        if found is None or is_none(found):
            return none_of(channels)
        if not asked:
            try:
                check_statistics(*found, None, "")
            except ValueError as error:
                raise WeightsError(f"{self.origin}: its normalisation has {error}: give --mean and --std") from error
            if len(found[0]) == len(found[1]) == 1:  # the same for every channel
                found = (found[0] * channels, found[1] * channels)
        if len(found[0]) != channels or len(found[1]) != channels:
            who = "--mean and --std have" if asked else f"{self.origin} says a normalisation of"
            raise WeightsError(f"{who} {len(found[0])} channels, {self.origin} takes images of {channels}")
        return found


def read_weights(
    source: str | Path, which: WeightsChoice = "auto", part: str = "", asked: Asked | None = None
) -> Weights:  # fmt: skip
    """The weights in a folder, a file or timm's collection.

    Args:
        source: a run or checkpoint folder, a file or a folder of weights, or `timm:NAME`.
        which: the trained weights (`model`), their moving average (`ema`), or the average where there is one (`auto`).
        part: of a file with several encoders, the name of the one that is meant: `teacher`, `student` …
        asked: what the user says of them.
    Raises:
        WeightsError: missing, truncated, unsafe, not a vision transformer's, or several encoders and no choice.
    """
    return _norm_in_front(replace(_read(source, which, part), asked=asked or Asked()))


def _norm_in_front(weights: Weights) -> Weights:
    """A classifier's norm of the cls token alone, timm's `fc_norm` with its pooling `token`, as that of all tokens.

    The logits are the same, and so the model is one that we and other libraries build. DeiT's two heads use none.
    """
    tensors, saved = weights.tensors, ((weights.config or {}).get("model") or {}).get("global_pool")
    pool = saved or weights.facts.pool if weights.asked.pool == "auto" else weights.asked.pool
    late = {"cls_token", "head.weight", "fc_norm.weight"} <= tensors.keys() and "norm.weight" not in tensors
    if pool != "cls" or not late or "head_dist.weight" in tensors:
        return weights
    return replace(weights, tensors={name.replace("fc_norm.", "norm."): t for name, t in tensors.items()})


def _read(source: str | Path, which: WeightsChoice, part: str) -> Weights:
    if str(source).startswith("timm:"):
        return _read_timm(str(source).removeprefix("timm:"))
    path = follow_best(Path(source).expanduser())
    if path.is_dir() and (inside := find_file(path)) is not None and not (path / "meta.json").exists():
        path = inside
    is_folder = is_dcp(path)
    if path.is_dir() and not is_folder:
        return _read_checkpoint(resolve_checkpoint(path), which, part)
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist; wanted a run or checkpoint folder, a .safetensors or .pth file, or timm:NAME"
        )
    opened, origin = open_folder(path) if is_folder else open_file(path), str(path)
    try:
        config = config_of(opened.metadata)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}: export it again") from error
    beside = {**opened.configs, "metadata": opened.metadata, "mimir_fast": config is not None}
    said = from_file(config, opened.metadata)
    return _understand(opened.content, beside, origin, which, part, config, said)


def _understand(
    content: Any, beside: dict[str, Any], origin: str, which: WeightsChoice = "auto", part: str = "",
    config: dict[str, Any] | None = None, said: Statistics | None = None,
) -> Weights:  # fmt: skip
    """The encoder in the content of a file, read by the layout it is written in; `said`: its normalisation."""
    anchors = {family.anchor for family in all_families().values()} | all_anchors()
    parts = find_parts(content, beside, anchors, origin)
    chosen = choose(parts, which, part, origin)
    layout = find_layout(chosen)
    try:
        read = layout.read(chosen)
        facts = read.facts if config else read.facts.over(facts_of_file(chosen.beside))
    except WeightsError as error:
        raise WeightsError(f"{origin} ({layout.title}): {error}") from error
    notes, left_out, unknown = list[str](), dict(read.left_out), list[str]()
    if others := other_names(parts, chosen):
        facts = Facts(part=".".join(chosen.path)).over(facts)
        left = ", ".join(others)
        notes.append(f"the file holds several encoders: taken is {facts.part or '(no key)'}, left are {left}")
    if not config:
        around = {name: tensor for name, tensor in chosen.around.items() if name not in {*read.taken, *left_out}}
        found = look_beside(around, chosen.others, has_head="head.weight" in read.tensors)
        left_out, unknown, said = left_out | found.reasons, found.unknown, said or found.statistics
    if said is not None:
        facts = Facts(mean=said[0], std=said[1]).over(facts)
    facts, scaled = in_unit_range(facts)
    notes += [scaled] if scaled else []
    if read.hint and config is None and facts.mean is None:
        notes.append(read.hint)
    return Weights(read.tensors, origin, config, facts, notes, layout.title, left_out, unknown)


def _read_checkpoint(folder: Path, which: WeightsChoice, part: str) -> Weights:
    meta = read_meta(folder)
    has_ema = any(name.startswith("ema/") for name in saved_tensors(folder))
    if which == "ema" and not has_ema:
        raise WeightsError(f"{folder} holds no moving average: leave that choice of weights out")
    use_ema = has_ema and which != "model"
    # The average covers what was trained; fixed tensors are with the weights.
    tensors = read_tensors(folder, "model/", *["ema/"] * use_ema)
    tensors = merge_lora(tensors, meta.get("config"))
    origin = f"{folder} ({'moving average' if use_ema else 'weights'} of step {meta.get('step', '?')})"
    config = meta.get("config")
    return _understand(tensors, {"mimir_fast": True}, origin, part=part, config=config, said=from_file(config))


def _read_timm(name: str) -> Weights:
    import timm

    check_timm_name(name)
    try:
        with weights_only():
            model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # no weights of that name, no network: timm and its hub raise many types
        raise WeightsError(
            f"timm:{name} cannot be had ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "list names with timm.list_pretrained('vit_*'), or give a downloaded .safetensors file"
        ) from error
    try:
        facts = facts_of_model(model)
    except WeightsError as error:
        raise WeightsError(f"timm:{name}: {error}") from error
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = _understand(tensors, {"pretrained_cfg": dict(model.pretrained_cfg)}, f"timm:{name}")
    return replace(weights, facts=facts.over(weights.facts))
