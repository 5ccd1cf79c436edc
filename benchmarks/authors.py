"""The MIMIR authors' public code as a rival, from a checkout the user names: `python -m benchmarks step --official P`.

It has no licence, so nothing of it is in this repository. Their models and attack are imported from P as they are;
only `np.float`, gone from today's numpy, is put back in memory. Their step is theirs line by line in what costs time: a
whole-image attack with its own mask, all patches embedded, nHSIC by inverses on the host, the gradients' norm by their
function (they do not clip), AdamW.
Shapes: B images, C channels, H × W pixels.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.apart import Apart
from benchmarks.case import Outputs, Provider
from benchmarks.training import Step
from mimir_fast.data.batch import Batch
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.models.file_names import to_files
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.sizes import height_width

VARIABLE = "MIMIR_FAST_OFFICIAL"
_PACKAGES = ("models", "util", "MI", "pgd_mae")


def checkout() -> Path:
    """Where their code lies, if the user said so."""
    return Path(os.environ.get(VARIABLE, ""))


def why_not() -> str:
    """Why it cannot be run here; empty if it can."""
    if VARIABLE not in os.environ:
        return "needs --official PATH, a checkout of github.com/xiaoyunxxy/MIMIR"
    return "" if (checkout() / "pretrain.py").is_file() else f"{checkout()} is no checkout: there is no pretrain.py"


@contextmanager
def importable(path: Path) -> Iterator[None]:
    """Their top-level modules have common names: they are importable inside, and forgotten after."""
    import numpy as np

    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in _PACKAGES}
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in [n for n in sys.modules if n.partition(".")[0] in _PACKAGES]:
            del sys.modules[name]
        sys.modules.update(hidden)


def authors_provider(
    name: str, constructor: str, model: MaskedModel, config: MimirConfig, ours: Step, *, bf16: bool = False,
    adversarial: bool = True, unknown: str = "", **more: Any,
) -> Provider:  # fmt: skip
    """Their step beside ours; on a CPU in a process of its own: ours keeps freed memory, a change to theirs too.

    Args:
        constructor: of theirs, such as `mae_vit_small` or `mae_convit_small`.
        model: its weights must fit theirs strictly.
        config: attack and λ.
        ours: its loss is the law: theirs, with draws of their own, must be within 5 % of it.
        adversarial: MIMIR; False is their MAE step.
        unknown: why they have no such model.
    """
    if skip := why_not() or unknown:
        return Provider(name, lambda inputs: (), skip=skip)
    weights = {key: weight.detach().clone() for key, weight in to_files(model, model.state_dict()).items()}
    device, encoder = next(iter(weights.values())).device, model.encoder
    step: Step = (partial(Apart, AuthorsStep) if device.type == "cpu" else AuthorsStep)(
        constructor, weights, config, device=device, bf16=bf16, adversarial=adversarial,
        image_size=height_width(encoder.image_size)[0], patch_size=encoder.mask_unit,
    )  # fmt: skip

    def law(inputs: Batch, outputs: Outputs) -> str:
        wanted, found = float(ours(inputs)[0]), float(outputs[0])
        return "" if abs(found - wanted) < 0.05 * wanted else f"a loss of {found:.3f}, ours is {wanted:.3f}"

    note = "their public code, own draws" + (", in its own process" if isinstance(step, Apart) else "")
    return Provider(name, step, precision="bf16" if bf16 else "fp32", law=law, note=note, **more)


class AuthorsStep:
    """One pre-training step of their code; calling it returns (loss, gradient norm). Arguments as above."""

    def __init__(
        self, name: str, weights: dict[str, Tensor], config: MimirConfig, *, image_size: int, patch_size: int,
        device: torch.device, bf16: bool, adversarial: bool,
    ) -> None:  # fmt: skip
        with importable(checkout()):
            module = import_module("models.mae_" + name.split("_")[1])
            self.model: nn.Module = getattr(module, name)(
                norm_pix_loss=config.norm_pix_loss, img_size=image_size, patch_size=patch_size
            )
            attack: Any = import_module("pgd_mae.pgd_mae").PGD_MAE
            self.nhsic: Any = import_module("MI.hsic").hsic_normalized_cca
            self.gradient_norm: Any = import_module("util.misc").get_grad_norm_
        self.model.load_state_dict(weights, strict=True)
        self.model.to(device).train()
        threat = config.attack
        self.attack = attack(
            self.model, eps=threat.eps, alpha=threat.alpha, steps=threat.num_steps, random_start=threat.random_start
        )
        self.config, self.bf16, self.adversarial = config, bf16, adversarial
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)

    def __call__(self, batch: Batch) -> Outputs:
        """uint8 images (B, C, H, W) become float in [0, 1], as their loader gives them."""
        samples = batch.images.float() / 255
        with torch.autocast(samples.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(samples, batch.labels)
        loss.backward()
        norm = self.gradient_norm(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().clone(), norm.detach().clone()

    def loss(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Their training loop's loss."""
        ratio = self.config.mask_ratio
        if not self.adversarial:
            return self.model(samples, mask_ratio=ratio)[0]
        adversarial = self.attack(samples, labels)
        loss, _, _, latent = self.model(samples, mask_ratio=ratio, adv_images=adversarial)
        with torch.autocast(samples.device.type, enabled=False):
            penalty = self.nhsic(latent.float().flatten(1), adversarial.flatten(1), sigma=5)
        return loss + self.config.mi.weight * penalty.to(loss.device)
