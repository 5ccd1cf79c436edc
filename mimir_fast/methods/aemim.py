"""AEMIM (Xiang et al., arXiv 2407.11537): reconstruct the masked clean image and the masked adversarial one.

    loss = L( x[masked], decoder(f_clean(x)) ) + w·L( x_adv[masked], decoder(f_adv(x_adv)) )
    x_adv = argmax over the ε-ball of  dist( f_adv(x_adv), f_clean(x) ),   seen through the same mask

One encoder f whose norm layers and cls token are kept twice, for clean and for adversarial images (adapters); one
decoder. The clean adapters are what is fine-tuned and exported. No code was published; what the paper leaves open is
an option here, and its default is ours: weight, step size, random start.

The features see visible patches only, so only there the attack has a gradient; masked patches of the adversarial image
keep the random start, as they would in the paper. Works on MAE (the default) and on SimMIM: `--model.decoder linear
--pixel_loss l1 --mask_unit 32 --no_norm_pix_loss --mask_ratio 0.6`.
Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.attacks.features import FeatureAttackConfig, attack_features
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.layers.norms import ADVERSARIAL, CLEAN
from mimir_fast.methods.adv_mae import attacked
from mimir_fast.methods.mae import Draws, MaeConfig, MaskedMethod, Shown, masked_model, preview_rows
from mimir_fast.methods.noise import UniformNoise, start_of
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.terms import Term, total
from mimir_fast.models.masked_model import Encoded, MaskedModel, View
from mimir_fast.ops.masked_loss import masked_loss
from mimir_fast.ops.patches import as_images, every_patch, gather_patches, unpatchify
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


class Attacked(NamedTuple):
    """Visible patches (B, K, P) and the whole image (B, N, P) after the attack, and scalars to log of it."""

    visible: Tensor
    whole: Tensor
    notes: dict[str, Tensor]


class Aemim(MaskedMethod):
    """Two reconstructions from two streams through one encoder."""

    config: AemimConfig

    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int | Tensor) -> Draws:
        """Mask and start of the attack, on all patches: the masked ones are targets too."""
        mask = self.draw_mask(model, batch, Stream.MASK, seed=seed, step=step)
        attack = self.config.attack
        delta = UniformNoise(batch.samples, seed, step, attack.eps)
        return Draws(mask, None, delta, attack.attacks_in(step), attack.compares_in(step))

    def losses(self, model: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{"loss", "reconstruction": of the clean image, "adversarial": of the adversarial one, before its weight}."""
        mask, p = draws.mask, masked_model(model).patch_size
        view, start = self.begin(batch.images, p, draws)
        # The features the attack leads away from are those of the clean stream: computed once.
        clean = Encoded(view, model(view, decode=False))
        shown = self.attack(model, view, start, draws, clean.latent)
        output = model(View(shown.visible, mask.keep, mask.masked, ADVERSARIAL), beside=clean)
        targets = (batch.images, p), (as_images(shown.whole), 1)
        errors = [
            masked_loss(
                prediction, images, mask.masked, patch_size, norm_pix=self.config.norm_pix_loss,
                kind=self.config.pixel_loss,
            )
            for prediction, (images, patch_size) in zip(output.prediction.chunk(2), targets, strict=True)
        ]  # fmt: skip
        return total(
            [Term("reconstruction", errors[0]), Term("adversarial", errors[1], self.config.adversarial_weight)],
            **shown.notes,
        )

    def begin(self, images: Tensor, patch_size: int, draws: Draws) -> tuple[View, Tensor]:
        """The visible patches of the clean images, and all patches (B, N, P) where the attack starts."""
        patches, start = start_of(images, every_patch(images, patch_size), patch_size, draws.delta)
        keep, masked = draws.mask.keep, draws.mask.masked
        return View(gather_patches(patches, keep), keep, masked, CLEAN), start

    def attack(
        self, model: nn.Module, view: View, start_BNP: Tensor, draws: Draws, clean_features: Tensor | None = None
    ) -> "Attacked":
        """The adversarial image, whole: attacked where visible, at the random start (overwritten) where masked."""
        visible_start = gather_patches(start_BNP, view.keep)
        of_features = partial(
            attack_features, model, view, visible_start, domain=ADVERSARIAL, clean_features=clean_features
        )
        visible, notes = attacked(of_features, self.config.attack, visible_start, draws)
        return Attacked(visible, start_BNP.scatter_(1, view.keep.unsqueeze(-1).expand_as(visible), visible), notes)

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """MAE's rows of the clean stream, the adversarial image and its own reconstruction."""
        bare = masked_model(model)
        draws = self.draw(bare, batch, seed=seed, step=step)
        p, norm_pix = bare.patch_size, self.config.norm_pix_loss
        view, start = self.begin(batch.images, p, draws)
        attacked = self.attack(model, view, start, draws)
        with borrowed(model) as module:
            clean, adversarial = (
                module(v).prediction.float()
                for v in (view._replace(masked=None), View(attacked.visible, view.keep, None, ADVERSARIAL))
            )
        rows = preview_rows(batch.images, Shown(view.patches), draws.mask, clean, p, norm_pix)
        own = preview_rows(unpatchify(attacked.whole, p), Shown(attacked.visible), draws.mask, adversarial, p, norm_pix)
        return rows | {"adversarial": own["input"], "adv. reconstr.": own["reconstruction"]}


register(
    MethodEntry(
        "aemim", "pretrain", AemimConfig, Aemim, "AEMIM: clean and adversarial images, both reconstructed",
        adapters=True,
    )
)  # fmt: skip
