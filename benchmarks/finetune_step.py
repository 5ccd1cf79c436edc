"""A PGD-10 adversarial training step, beside the same one written plainly with torchattacks and timm.

Both start PGD at the clean image, so that they compute the same numbers and the gate can say so; a random start costs
one pass over the images. Ours runs in bf16, as training does; the plain one in fp32, which is what one gets, and in
bf16, which is what one gets with an autocast around it.
Floor: 10 forwards and input-backwards, one forward and backward: 23 forward passes.
Shapes: B images, K classes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Outputs, Provider, Size, generator
from mimir_fast.data.batch import Batch
from mimir_fast.methods.classification import ClassificationConfig, default_attack
from mimir_fast.methods.pgd import Pgd
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier
from mimir_fast.models.families.vit import SIZES as ENCODERS
from mimir_fast.training.distributed import World, parallelize
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer

THREAT = replace(default_attack(), random_start=False)
NUM_CLASSES = 1000
Run = Callable[[Batch], Outputs]

# encoder, image side, patch, batch
Setting = tuple[str, int, int, int]
SETTINGS: dict[Size, Setting] = {
    "tiny": ("tiny", 32, 16, 2),
    "quick": ("tiny", 224, 16, 4),
    "full": ("small", 224, 16, 4),
}
ON_GPU: Setting = ("small", 224, 16, 256)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """One setting a size."""
    cuda = device.type == "cuda"
    yield case(device, ON_GPU if cuda and size != "tiny" else SETTINGS[size], compile_too=cuda)


def case(device: torch.device, setting: Setting, *, compile_too: bool) -> Case:
    """The same weights in our classifier and in timm's."""
    encoder, side, patch, batch = setting
    model = build_model(setting, device)
    exact = copy.deepcopy(model).double()
    missing = next(
        (f"{name} is not installed: make setup" for name in ("torchattacks", "timm") if not find_spec(name)), ""
    )
    rival: nn.Module = nn.Identity() if missing else timm_twin(model, setting).to(device)

    def make_inputs(seed: int, count: int = batch) -> Batch:
        rng = generator(device, seed)
        images = torch.empty(count, 3, side, side, dtype=torch.uint8, device=device).random_(0, 256, generator=rng)
        labels = torch.randint(0, NUM_CLASSES, (count,), device=device, generator=rng)
        samples = torch.arange(count, device=device)
        return Batch(images, labels, samples, torch.zeros_like(samples))

    def reference(inputs: Batch) -> Outputs:
        return our_step(exact, bf16=False)(replace(inputs, images=inputs.images.double() / 255))

    providers = [
        Provider("mimir_fast bf16", our_step(model, bf16=True)),
        Provider("mimir_fast fp32", our_step(model, bf16=False), precision="fp32"),
        Provider(
            "plain fp32", plain_step(rival, bf16=False), precision="fp32", skip=missing,
            note="torchattacks.PGD, timm, AdamW",
        ),
        Provider("plain bf16", plain_step(rival, bf16=True), skip=missing, note="the same inside autocast"),
    ]  # fmt: skip
    ratios = {
        "plain fp32 / ours bf16": ("plain fp32", "mimir_fast bf16"),
        "plain bf16 / ours bf16": ("plain bf16", "mimir_fast bf16"),
        "plain fp32 / ours fp32": ("plain fp32", "mimir_fast fp32"),
    }
    if compile_too:
        fast = copy.deepcopy(model)
        parallelize(fast, "single", World(0, 1, device), bf16=True, compiled=True)
        providers.append(Provider("mimir_fast bf16 compiled", our_step(fast, bf16=True)))
        ratios["plain bf16 / ours compiled"] = ("plain bf16", "mimir_fast bf16 compiled")
    return Case(
        "finetune_step",
        {"encoder": encoder, "image": side, "patch": patch, "batch": batch, "attack": "PGD-10"},
        providers,
        baseline="mimir_fast fp32" if missing else "plain fp32",
        make_inputs=make_inputs,
        gate_inputs=lambda seed: make_inputs(seed, 2),
        reference=reference,
        # Ten signed steps amplify rounding: a gradient near zero flips its sign. The loss says whether it matters.
        tolerance=(5e-2, 0.5),
        flops=23.0 * batch * forward_flops(setting),
        precision="bf16",
        items=batch,
        ratios=ratios,
    )


def build_model(setting: Setting, device: torch.device) -> Classifier:
    """A classifier with a head that has opinions: the fresh one's are all but equal."""
    encoder, side, patch, _ = setting
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ClassifierConfig(encoder=encoder, patch_size=patch, drop_path=0.0)
        model = build_classifier(config, side, NUM_CLASSES)
        nn.init.normal_(model.head.weight, std=0.05)
    return model.to(device).train()


def timm_twin(model: Classifier, setting: Setting) -> nn.Module:
    """timm's vision transformer of the same shape and weights."""
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    encoder, side, patch, _ = setting
    width, depth, heads = ENCODERS[encoder]
    twin = TimmViT(
        side, patch, num_classes=NUM_CLASSES, embed_dim=width, depth=depth, num_heads=heads, global_pool="avg",
        fc_norm=True,
    )  # fmt: skip
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.train()


def our_step(model: Classifier, *, bf16: bool) -> Run:
    """(loss, gradient norm) of the package's method and optimiser."""
    method = Pgd(ClassificationConfig(attack=THREAT))
    optimizer = build_optimizer(model, OptimizerConfig())

    def run(batch: Batch) -> Outputs:
        with autocast(batch.images.device, bf16):
            loss = method(model, batch, seed=0, step=0)["loss"]
        return finish(model, optimizer, loss)

    return run


def plain_step(model: nn.Module, *, bf16: bool) -> Run:
    """Attack, cross entropy, backward, AdamW, as a tutorial has it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0) if list(model.parameters()) else None

    def run(batch: Batch) -> Outputs:
        import torchattacks

        assert optimizer is not None  # the provider is skipped when there is no model
        images = batch.images.float() / 255
        attack = torchattacks.PGD(model, THREAT.eps, THREAT.alpha, THREAT.num_steps, random_start=False)
        with autocast(images.device, bf16):
            adversarial = attack(images, batch.labels)
            loss = F.cross_entropy(model(adversarial), batch.labels)
        return finish(model, optimizer, loss)

    return run


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Outputs:
    """Backward, gradient norm, optimiser."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach().clone(), norm.detach().clone()


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """bf16 where wanted."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def forward_flops(setting: Setting) -> float:
    """Of one image."""
    encoder, side, patch, _ = setting
    width, depth, _ = ENCODERS[encoder]
    num_patches = (side // patch) ** 2
    tokens = num_patches + 1
    return float(depth * tokens * (24 * width**2 + 4 * tokens * width) + 2 * num_patches * 3 * patch**2 * width)
