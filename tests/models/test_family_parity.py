"""ConViT, CaiT and XCiT against the MIMIR authors' own code: latent, prediction, loss and every gradient.

Cases are pairs NAME.json (arguments) and NAME.safetensors in the folder MIMIR_FAST_GOLDEN_FAMILIES; which family a case
is of is told from its tensors. In the authors' mode: kept patches on a pseudo-grid, XCiT's stem over the whole image.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import load_file_state
from safetensors.torch import load_file
from torch import Tensor

from mimir_fast.models.families.cait import CaitDecoder, CaitEncoder
from mimir_fast.models.families.convit import ConvitDecoder, ConvitEncoder
from mimir_fast.models.families.xcit import XcitDecoder, XcitEncoder
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.patches import gather_patches, masked_targets, patchify

FOLDER = Path(os.environ.get("MIMIR_FAST_GOLDEN_FAMILIES", Path(__file__).parents[1] / "golden" / "families"))
CASES = sorted(path.with_suffix("") for path in FOLDER.glob("*.json"))
FAMILIES = {
    "attn.gating_param": (ConvitEncoder, ConvitDecoder),
    "attn.proj_l.weight": (CaitEncoder, CaitDecoder),
    "attn.temperature": (XcitEncoder, XcitDecoder),
}
OUR_NAMES = {"img_size": "image_size", "in_chans": "channels", "embed_dim": "width"}
DEFAULTS = {  # of the authors' constructors, where a case says nothing
    "convit": {"local_up_to_layer": 3, "qkv_bias": False, "positions": "official"},
    "cait": {"init_values": 1e-4},
    "xcit": {"tokens_norm": False, "positions": "official"},
}


def build(arguments: dict[str, Any], decoder: dict[str, int], state: dict[str, Tensor]) -> MaskedModel:
    """The model of a case, with its weights, in eval mode: batch norms as saved."""
    sign = next(sign for sign in FAMILIES if any(name.endswith(sign) for name in state))
    encoder_class, decoder_class = FAMILIES[sign]
    family = encoder_class.__module__.rpartition(".")[2]
    named = DEFAULTS[family] | {OUR_NAMES.get(name, name): value for name, value in arguments.items()}
    if family == "convit":
        named["width"] *= named["num_heads"]  # theirs is the width of a head
    encoder = encoder_class(**named)
    mlp_ratio = arguments.get("mlp_ratio", 4.0)
    model = MaskedModel(
        encoder, decoder_class(encoder, decoder["width"], decoder["depth"], decoder["heads"], mlp_ratio)
    )
    load_file_state(model, state)
    return model.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_equals_the_authors_code(case: Path) -> None:
    setup, golden = json.loads(case.with_suffix(".json").read_text()), load_file(case.with_suffix(".safetensors"))
    state = {name.removeprefix("state/"): t for name, t in golden.items() if name.startswith("state/")}
    model = build(setup["model"], setup["decoder"], state)
    images, keep = golden["images"].clone().requires_grad_(), golden["ids_keep"]

    tokens = model.encoder.embed(patchify(images, model.patch_size), None)
    latent = model.encoder.encode(gather_patches(tokens, keep), keep)
    prediction = model.decoder(latent, keep)
    torch.testing.assert_close(latent, golden["latent"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction, golden["prediction"], rtol=1e-5, atol=1e-5)

    masked = golden["mask"].nonzero()[:, 1].view(len(images), -1)
    target = masked_targets(golden["images"], masked, model.patch_size, norm_pix=setup["norm_pix_loss"])
    wanted = model.decoder(latent, keep, masked)
    torch.testing.assert_close(wanted, gather_patches(prediction, masked), rtol=1e-5, atol=1e-5)
    loss = (wanted - target).square().mean()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-6, atol=1e-6)

    loss.backward()
    got = {name: p.grad for name, p in flat(model) if p.requires_grad} | {"image_grad": images.grad}
    theirs = {n.removeprefix("grad/"): t for n, t in golden.items() if n.startswith("grad/")}
    theirs["image_grad"] = golden["image_grad"]
    assert got.keys() == theirs.keys()
    # What is zero but for rounding (a bias before a softmax) is held against the other gradients.
    floor = 1e-3 * max(float(t.abs().max()) for n, t in theirs.items() if n != "image_grad")
    worst = {n: float((got[n] - t).abs().max() / t.abs().max().clamp(min=floor)) for n, t in theirs.items()}
    assert max(worst.values()) <= 1e-4, {n: value for n, value in worst.items() if value > 1e-4}


def flat(model: MaskedModel) -> list[tuple[str, torch.nn.Parameter]]:
    from mimir_fast.models.file_names import parameters_by_file_name

    return list(parameters_by_file_name(model))


def test_cases_are_there() -> None:
    assert CASES, f"no *.json in {FOLDER}"
