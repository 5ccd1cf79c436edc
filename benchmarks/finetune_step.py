"""A PGD-10 adversarial training step, beside the same one written plainly with torchattacks and timm.

Both start PGD at the clean image, so that they compute the same numbers and the gate can say so; a random start costs
one pass over the images. Ours runs in bf16, as training does; the plain one in fp32, which is what one gets, and in
bf16, which is what one gets with an autocast around it.
Floor: 10 forwards and input-backwards, one forward and backward: 23 forward passes.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Provider, Size
from benchmarks.products import Products, forward_shapes
from benchmarks.training import ENCODERS, Step, block_flops, on_doubles, optimizer_step, random_batch, seeded
from mimir_fast.data.batch import Batch
from mimir_fast.methods.classification import ClassificationConfig, default_attack
from mimir_fast.methods.pgd import Pgd
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier
from mimir_fast.models.file_names import to_files
from mimir_fast.training.distributed import World, parallelize

THREAT = replace(default_attack(), random_start=False)
NUM_CLASSES = 1000
# Of (loss, gradient norm). Ten signed steps amplify rounding, as a gradient near zero flips its sign: fp32 shows
# 1.5e-5, bf16 5e-4 at ViT-S, and a smaller model ten times that.
TOLERANCE = {"fp32": (1e-3, 1e-3), "bf16": (1e-2, 5e-2)}

# encoder, image side, patch, batch
Setting = tuple[str, int, int, int]
SETTINGS: dict[Size, Setting] = {
    "tiny": ("tiny", 32, 16, 2),
    "quick": ("tiny", 224, 16, 4),
    "full": ("small", 224, 16, 4),
    "gpu": ("small", 224, 16, 256),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """One setting a size: the same weights in our classifier and in timm's."""
    setting = SETTINGS[size]
    encoder, side, patch, batch = setting
    model = seeded(lambda: build_model(setting), device)
    exact = copy.deepcopy(model).double()
    image = torch.zeros(1, 3, side, side, dtype=torch.float64, device=device)
    absent = [name for name in ("torchattacks", "timm") if not find_spec(name)]
    missing = f"{absent[0]} is not installed: make setup" if absent else ""
    rival: nn.Module = nn.Linear(1, 1) if missing else timm_twin(model, setting).to(device)

    def ours(precision: str, name: str = "mimir_fast", model: Classifier = model) -> Provider:
        step = our_step(model, bf16=precision == "bf16")
        return Provider(f"{name} {precision}", step, TOLERANCE[precision], precision)

    def plain(precision: str, note: str) -> Provider:
        step = plain_step(rival, bf16=precision == "bf16")
        return Provider(f"plain {precision}", step, TOLERANCE[precision], precision, note=note, skip=missing)

    providers = [
        ours("bf16"),
        ours("fp32"),
        plain("fp32", "torchattacks.PGD, timm, AdamW"),
        plain("bf16", "the same inside autocast"),
    ]
    ratios = {
        "plain fp32 / ours bf16": ("plain fp32", "mimir_fast bf16"),
        "plain bf16 / ours bf16": ("plain bf16", "mimir_fast bf16"),
        "plain fp32 / ours fp32": ("plain fp32", "mimir_fast fp32"),
    }
    if device.type == "cuda":
        fast = copy.deepcopy(model)
        parallelize(fast, "single", World(0, 1, device), bf16=True, compiled=True)
        providers.append(ours("bf16", "mimir_fast compiled", fast))
        ratios["plain bf16 / ours compiled"] = ("plain bf16", "mimir_fast compiled bf16")
    yield Case(
        "finetune_step",
        {"encoder": encoder, "image": side, "patch": patch, "batch": batch, "attack": "PGD-10"},
        providers,
        baseline="mimir_fast fp32" if missing else "plain fp32",
        make_inputs=partial(random_batch, batch, side, NUM_CLASSES),
        gate_inputs=partial(random_batch, 2, side, NUM_CLASSES),
        reference=on_doubles(our_step(exact, bf16=False)),
        flops=23.0 * batch * forward_flops(setting),
        products=Products(forward_shapes(lambda: exact(image), batch), (11, 11, 1)),
        items=batch,
        ratios=ratios,
    )


def build_model(setting: Setting) -> Classifier:
    """A classifier with a head that has opinions: the fresh one's are all but equal."""
    encoder, side, patch, _ = setting
    model = build_classifier(ClassifierConfig(encoder=encoder, patch_size=patch, drop_path=0.0), side, NUM_CLASSES)
    nn.init.normal_(model.head.weight, std=0.05)
    return model.train()


def timm_twin(model: Classifier, setting: Setting) -> nn.Module:
    """timm's vision transformer of the same shape and weights."""
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    encoder, side, patch, _ = setting
    width, depth, heads = ENCODERS[encoder]
    twin = TimmViT(
        side, patch, num_classes=NUM_CLASSES, embed_dim=width, depth=depth, num_heads=heads, global_pool="avg",
        fc_norm=True,
    )  # fmt: skip
    twin.load_state_dict(to_files(model, model.state_dict()), strict=True)
    return twin.train()


def our_step(model: Classifier, *, bf16: bool) -> Step:
    """The package's method and optimiser."""
    method = Pgd(ClassificationConfig(attack=THREAT))
    return optimizer_step(model, lambda batch: method(model, batch, seed=0, step=0)["loss"], bf16=bf16)


def plain_step(model: nn.Module, *, bf16: bool) -> Step:
    """Attack, cross entropy, backward, AdamW, as a tutorial has it."""

    def loss(batch: Batch) -> Tensor:
        import torchattacks

        attack = torchattacks.PGD(model, THREAT.eps, THREAT.alpha, THREAT.num_steps, random_start=False)
        adversarial = attack(batch.images.float() / 255, batch.labels)
        return F.cross_entropy(model(adversarial), batch.labels)

    return optimizer_step(model, loss, bf16=bf16, plain=True)


def forward_flops(setting: Setting) -> float:
    """FLOPs of a forward pass of one image."""
    encoder, side, patch, _ = setting
    width, depth, _ = ENCODERS[encoder]
    num_patches = (side // patch) ** 2
    return block_flops(num_patches + 1, width, depth) + 2.0 * num_patches * 3 * patch**2 * width
