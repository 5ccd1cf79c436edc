"""AEMIM (Xiang et al., arXiv 2407.11537): reconstruct the masked clean image and the masked adversarial one.

    loss = L( x[masked], decoder(f_clean(x)) ) + w·L( x_adv[masked], decoder(f_adv(x_adv)) )
    x_adv = argmax over the ε-ball of  dist( f_adv(x_adv), f_clean(x) ),   seen through the same mask

One encoder f whose norm layers and cls token are kept twice, for clean and for adversarial images (adapters); one
decoder. The clean adapters are what is fine-tuned and exported. No code was published; what the paper leaves open is
an option here, and its default is ours: weight, step size, random start.

The features see visible patches only, so only there the attack has a gradient; masked patches of the adversarial image
keep the random start, as they would in the paper. Both streams go through the model in one call: data parallelism
sees one forward pass. Works on MAE (default) and on SimMIM (`--model.decoder linear --pixel_loss l1 --mask_unit 32
--norm_pix_loss False --mask_ratio 0.6`).
Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.features import FeatureAttackConfig, attack_features
from mimir_fast.attacks.modes import borrowed_in_mode
from mimir_fast.data.batch import Batch
from mimir_fast.methods.mae import Draws, Mae, MaeConfig, Shown, masked_model, preview_rows, reconstruction_loss
from mimir_fast.methods.noise_mae import uniform_delta
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.terms import Term, total
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.models.norms import ADVERSARIAL, CLEAN
from mimir_fast.ops.patches import gather_patches, masked_targets, normalize_patches, patchify, unpatchify
from mimir_fast.philox import Stream


@dataclass
class AemimConfig(MaeConfig):
    """MAE's options, the feature attack, and the weight of the second task."""

    attack: FeatureAttackConfig = field(default_factory=FeatureAttackConfig)
    adversarial_weight: float = 1.0
    """Of the adversarial reconstruction; not published, 1 is ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.adversarial_weight < float("inf"):
            raise ValueError(f"adversarial_weight={self.adversarial_weight}, wanted a finite number of 0 or more")


class Aemim(Mae):
    """Two reconstructions from two streams through one encoder."""

    config: AemimConfig

    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int) -> Draws:
        """Mask and start of the attack, on all patches: the masked ones are targets too."""
        mask = self.draw_mask(model, batch, Stream.MASK, seed=seed, step=step)
        shape = (model.num_patches, model.encoder.patch_dim)
        return Draws(mask, delta=uniform_delta(batch.samples, shape, self.config.attack.eps, seed=seed, step=step))

    def perturb(self, model: nn.Module, images: Tensor, draws: Draws, target_BMP: Tensor) -> Shown:
        """The adversarial images, whole: attacked where visible, at the random start where masked."""
        assert draws.delta is not None, "aemim draws where the attack starts"
        patches, keep = patchify(images, masked_model(model).patch_size), draws.mask.keep
        start = (patches + draws.delta).clamp_(0, 1)
        clean = View(gather_patches(patches, keep), keep, domain=CLEAN)
        visible = attack_features(model, clean, gather_patches(start, keep), self.config.attack, domain=ADVERSARIAL)
        return Shown(visible, start.scatter_(1, keep.unsqueeze(-1).expand_as(visible), visible))

    def losses(self, model: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{"loss", "reconstruction": of the clean image, "adversarial": of the adversarial one, before its weight}."""
        clean, adversarial, shown = self.views(model, batch, draws)
        assert shown.patches is not None
        target = masked_targets(
            batch.images, draws.mask.masked, masked_model(model).patch_size, norm_pix=self.config.norm_pix_loss
        )
        own_target = gather_patches(shown.patches, draws.mask.masked)
        if self.config.norm_pix_loss:
            own_target = normalize_patches(own_target)
        outputs: Any = model(clean, adversarial)
        kind = self.config.pixel_loss
        return total(
            [
                Term("reconstruction", reconstruction_loss(outputs[0].prediction, target, kind)),
                Term(
                    "adversarial",
                    reconstruction_loss(outputs[1].prediction, own_target, kind),
                    self.config.adversarial_weight,
                ),
            ]
        )

    def views(self, model: nn.Module, batch: Batch, draws: Draws) -> tuple[View, View, Shown]:
        """The clean and the adversarial view of a batch, and the whole adversarial image."""
        patches, mask = patchify(batch.images, masked_model(model).patch_size), draws.mask
        shown = self.perturb(model, batch.images, draws, patches)
        clean = View(gather_patches(patches, mask.keep), mask.keep, mask.masked, CLEAN)
        return clean, View(shown.visible, mask.keep, mask.masked, ADVERSARIAL), shown

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """MAE's rows of the clean stream, the adversarial image and its own reconstruction."""
        bare = masked_model(model)
        draws = self.draw(bare, batch, seed=seed, step=step)
        clean, adversarial, shown = self.views(model, batch, draws)
        with borrowed_in_mode(model) as module:
            outputs = module(clean._replace(masked=None), adversarial._replace(masked=None))
        p, norm_pix = bare.patch_size, self.config.norm_pix_loss
        rows = preview_rows(batch.images, Shown(clean.patches), draws.mask, outputs[0].prediction.float(), p, norm_pix)
        assert shown.patches is not None
        own = preview_rows(unpatchify(shown.patches, p), shown, draws.mask, outputs[1].prediction.float(), p, norm_pix)
        return rows | {"adversarial": own["input"], "adv. reconstr.": own["reconstruction"]}


register(
    MethodEntry(
        "aemim", "pretrain", AemimConfig, Aemim, "AEMIM: clean and adversarial images, both reconstructed",
        adapters=True,
    )
)  # fmt: skip
