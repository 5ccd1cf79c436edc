"""Images that are not square, in every family and from the command line to the report."""

from dataclasses import replace

import pytest
import torch
from family_checks import (
    Case,
    check_all_visible_equals_whole,
    check_equals_timm,
    check_nothing_leaks,
    check_recognised,
)

from mimir_fast.models.families import all_families
from mimir_fast.ops.patches import patchify

SIZE = (32, 48)
CASES = {
    family: Case(family, "nano", SIZE, {"swin": 2, "convnext": 2}.get(family, 8)) for family in sorted(all_families())
}
every_family = pytest.mark.parametrize("family", CASES)
# timm's have the cls token pooled, or a norm behind the mean.
POOLS = {"cait": {"global_pool": "cls"}, "xcit": {"global_pool": "cls"}}


@pytest.mark.parametrize("family", [family for family in CASES if family != "convit"])
def test_equals_timm(family: str) -> None:
    check_equals_timm(CASES[family], **POOLS.get(family, {}))


@every_family
def test_masks_and_places(family: str) -> None:
    check_all_visible_equals_whole(CASES[family])
    check_nothing_leaks(CASES[family])
    check_recognised(CASES[family])


@pytest.mark.parametrize("family", ["vit", "convit", "cait", "convstem", "convnext"])
def test_is_the_upper_part_of_a_square(family: str) -> None:
    """32 x 48 pixels are what a model of 48 x 48 makes of them where the lowest rows are masked."""
    case = CASES[family]
    encoder, square = case.encoder(), replace(case, image_size=48).encoder()
    tensors = square.state_dict()
    if "pos_embed" in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, : encoder.state_dict()["pos_embed"].shape[1]]
    encoder.load_state_dict(tensors)
    patches = patchify(case.images(), encoder.mask_unit)
    places = torch.arange(encoder.num_patches).expand(2, -1)
    with torch.no_grad():
        ours, theirs = encoder(patches, None), square(patches, places)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
