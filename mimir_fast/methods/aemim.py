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
from mimir_fast.attacks.modes import borrowed_in_mode
from mimir_fast.data.batch import Batch
from mimir_fast.methods.adv_mae import attacked
from mimir_fast.methods.mae import (
    Draws,
    MaeConfig,
    MaskedMethod,
    Shown,
    masked_model,
    preview_rows,
    reconstruction_loss,
)
from mimir_fast.methods.masking import Mask
from mimir_fast.methods.noise_mae import uniform_delta
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.terms import Term, total
from mimir_fast.models.masked_model import Encoded, MaskedModel, View
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
        shape = (model.num_patches, model.encoder.patch_dim)
        attack = self.config.attack
        delta = uniform_delta(batch.samples, shape, attack.eps, seed=seed, step=step)
        return Draws(mask, None, delta, attack.attacks_in(step), attack.compares_in(step))

    def losses(self, model: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{"loss", "reconstruction": of the clean image, "adversarial": of the adversarial one, before its weight}."""
        mask, p, norm_pix = draws.mask, masked_model(model).patch_size, self.config.norm_pix_loss
        patches = patchify(batch.images, p)
        view = clean_view(patches, mask)
        # The features the attack leads away from are those of the clean stream: computed once.
        clean = Encoded(view, model(view, decode=False))
        shown = self.attack(model, patches, draws, clean.latent)
        output = model(View(shown.visible, mask.keep, mask.masked, ADVERSARIAL), beside=clean)
        own_target = gather_patches(shown.whole, mask.masked)
        targets = (
            masked_targets(batch.images, mask.masked, p, norm_pix=norm_pix),
            normalize_patches(own_target) if norm_pix else own_target,
        )
        errors = [
            reconstruction_loss(prediction, target, self.config.pixel_loss)
            for prediction, target in zip(output.prediction.chunk(2), targets, strict=True)
        ]
        return total(
            [Term("reconstruction", errors[0]), Term("adversarial", errors[1], self.config.adversarial_weight)],
            **shown.notes,
        )

    def attack(
        self, model: nn.Module, patches_BNP: Tensor, draws: Draws, clean_features: Tensor | None = None
    ) -> "Attacked":
        """The adversarial image, whole: attacked where visible, at the random start where masked."""
        assert draws.delta is not None, "aemim draws where the attack starts"
        keep = draws.mask.keep
        start = (patches_BNP + draws.delta).clamp_(0, 1)
        visible_start = gather_patches(start, keep)
        of_features = partial(
            attack_features, model, clean_view(patches_BNP, draws.mask), visible_start, domain=ADVERSARIAL,
            clean_features=clean_features,
        )  # fmt: skip
        visible, notes = attacked(of_features, self.config.attack, visible_start, draws)
        return Attacked(visible, start.scatter_(1, keep.unsqueeze(-1).expand_as(visible), visible), notes)

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """MAE's rows of the clean stream, the adversarial image and its own reconstruction."""
        bare = masked_model(model)
        draws = self.draw(bare, batch, seed=seed, step=step)
        p, norm_pix, patches = bare.patch_size, self.config.norm_pix_loss, patchify(batch.images, bare.patch_size)
        view, attacked = clean_view(patches, draws.mask), self.attack(model, patches, draws)
        with borrowed_in_mode(model) as module:
            clean, adversarial = (
                module(v).prediction.float()
                for v in (view._replace(masked=None), View(attacked.visible, view.keep, None, ADVERSARIAL))
            )
        rows = preview_rows(batch.images, Shown(view.patches), draws.mask, clean, p, norm_pix)
        own = preview_rows(unpatchify(attacked.whole, p), Shown(attacked.visible), draws.mask, adversarial, p, norm_pix)
        return rows | {"adversarial": own["input"], "adv. reconstr.": own["reconstruction"]}


def clean_view(patches_BNP: Tensor, mask: Mask) -> View:
    """The visible patches of a clean image."""
    return View(gather_patches(patches_BNP, mask.keep), mask.keep, mask.masked, CLEAN)


register(
    MethodEntry(
        "aemim", "pretrain", AemimConfig, Aemim, "AEMIM: clean and adversarial images, both reconstructed",
        adapters=True,
    )
)  # fmt: skip
