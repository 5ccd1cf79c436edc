"""A folder for Hugging Face's transformers: config.json, preprocessor_config.json, model.safetensors.

transformers keeps the normalisation out of its models: it is in the preprocessor's file, with the size of the images.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.exporting.compare import Function, difference
from mimir_fast.exporting.formats import Format, register, says
from mimir_fast.exporting.hugging_face import Twin, find_twin
from mimir_fast.exporting.original import Original
from mimir_fast.models.masked_loading import load_masked_model
from mimir_fast.models.masked_model import View
from mimir_fast.ops.patches import gather_patches, patchify
from mimir_fast.sizes import height_width

MADE_BY = {"made_by": "mimir_fast"}
BICUBIC = 3  # in PIL
CENTRE = 224 / 256  # of an image that is brought to size as ImageNet's are: side of the crop / short side before it


def write(original: Original, path: Path) -> float:
    """Read back by `from_pretrained` of the class, and by AutoImageProcessor."""
    twin = find_twin(original)
    path.mkdir()
    config = {"architectures": [twin.class_name], **twin.config, **MADE_BY}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor(original), indent=2) + "\n")
    save_tensors(twin.tensors, path / "model.safetensors", {"format": "pt"})
    model, normalise = _read(twin, path)

    def run(images: Tensor) -> Tensor:
        result: Tensor = getattr(model(normalise(images)), twin.output)
        return result

    if twin.class_name != "ViTMAEForPreTraining":
        return difference(run, original)

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(normalise(images), noise=_noise(images, original)).logits
        return logits

    return difference(predict, original, _reconstruction(original, model.config.mask_ratio))


def _read(twin: Twin, path: Path) -> tuple[Any, Function]:
    """The model, and what its image processor does to images in [0, 1] of its size."""
    import transformers

    with _quiet(transformers):
        model, found = getattr(transformers, twin.class_name).from_pretrained(
            path, output_loading_info=True, **twin.options
        )
        processor = transformers.AutoImageProcessor.from_pretrained(path)
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names and kind != "error_msgs"}
    if wrong:
        words = "; ".join(f"{kind.replace('_', ' ')} {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ValueError(f"transformers' {twin.class_name} does not read these tensors whole: {words}")

    def normalise(images: Tensor) -> Tensor:
        options = {"do_resize": False, "do_center_crop": False, "do_rescale": False}
        pixels: Tensor = processor(list(images), input_data_format="channels_first", return_tensors="pt", **options)[
            "pixel_values"
        ]
        return pixels

    return model.eval(), normalise


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and remarks: what was read is compared."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def preprocessor(original: Original) -> dict[str, Any]:
    """Of preprocessor_config.json: as our evaluation brings images to size, and the normalisation.

    ConvNeXt's processor is the one of transformers that resizes the short side and cuts the centre out.
    """
    mean, std = original.statistics
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True, "size": {"shortest_edge": original.architecture.image_size}, "crop_pct": _crop(original),
        "resample": BICUBIC, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip


def _crop(original: Original) -> float:
    """As the run's images were brought to size; where that is not known, as ImageNet's from 128 pixels on."""
    data = (original.weights.config or {}).get("data") or {}
    cropped = (
        data["augment"] == "resized_crop"
        if "augment" in data
        else min(height_width(original.architecture.image_size)) >= 128
    )
    return CENTRE if cropped else 1.0


def _noise(images: Tensor, original: Original) -> Tensor:
    """(B, N): transformers keeps the patches with the smallest numbers."""
    count = original.model.encoder.num_patches
    return torch.rand(len(images), count, generator=torch.Generator().manual_seed(len(images)))


def _reconstruction(original: Original, mask_ratio: float) -> Function:
    """What our model predicts everywhere, from the patches that transformers keeps."""
    model, _ = load_masked_model(original.plain_weights)

    def predict(images: Tensor) -> Tensor:
        keep = _noise(images, original).argsort(dim=1)[:, : int(model.num_patches * (1 - mask_ratio))]
        prediction: Tensor = model(View(gather_patches(patchify(images, model.patch_size), keep), keep)).prediction
        return prediction

    return predict


def use(original: Original, path: Path) -> str:
    """Loading the model and its image processor, and what that does."""
    twin, settings = find_twin(original), preprocessor(original)
    options = "".join(f", {name}={value}" for name, value in twin.options.items())
    side = original.architecture.image_size
    short = int(side / settings["crop_pct"])
    return (
        f"transformers.{twin.class_name}.from_pretrained({str(path)!r}{options})"
        f"\n     transformers.AutoImageProcessor.from_pretrained({str(path)!r})  # short side to {short} pixels, "
        f"bicubic, the {side} in the centre; mean {settings['image_mean']}, std {settings['image_std']}"
    )


def wrote(folder: Path) -> bool:
    """By its configuration."""
    return all(says(folder / "config.json", key, value) for key, value in MADE_BY.items())


FILES = frozenset({"config.json", "preprocessor_config.json", "model.safetensors"})

register(Format("hf", "", write, use, needs=("transformers",), extra="hf", holds=FILES, wrote=wrote))
