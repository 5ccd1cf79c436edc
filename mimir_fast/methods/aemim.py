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

from torch import Tensor

from mimir_fast.attacks.features import FeatureAttackConfig, feature_distance
from mimir_fast.attacks.training_attack import attack_in_training
from mimir_fast.layers.norms import ADVERSARIAL, CLEAN
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.step import Losses, MaskedStep
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.patches import as_images, every_patch, gather_patches, patchify
from mimir_fast.validation import check_number


@dataclass
class AemimConfig(MaeConfig):
    """MAE's options, the feature attack, and the weight of the second task."""

    attack: FeatureAttackConfig = field(default_factory=FeatureAttackConfig)
    adversarial_weight: float = 1.0
    """Weight of the adversarial reconstruction; not published, 1 is our choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("adversarial_weight", self.adversarial_weight, at_least=0)


class Aemim(Mae):
    """Two reconstructions from two streams through one encoder."""

    config: AemimConfig

    def perturb(self, step: MaskedStep) -> None:
        """Fill in the clean stream and the adversarial image: attacked where visible, noise (a target) where masked."""
        attack, images, keep = self.config.attack, step.batch.images, step.mask.keep
        radius = attack.eps if attack.random_start else None
        patches, whole = step.noisy_patches(every_patch(images, step.bare.patch_size), radius)
        clean = View(gather_patches(patches, keep), *step.mask, CLEAN)
        features = step.model(clean, decode=False)  # the attack leads away from them, the training pass decodes them
        step.clean = clean, features

        def distance(model: MaskedModel, visible: Tensor) -> Tensor:
            found = model(clean._replace(patches=visible, domain=ADVERSARIAL), decode=False)
            return feature_distance(found, features.detach(), attack.distance)

        step.visible, step.log = attack_in_training(
            step.model, distance, clean.patches, gather_patches(whole, keep), attack, step.number
        )
        step.whole = whole.scatter_(1, keep.unsqueeze(-1).expand_as(step.visible), step.visible)

    def forward(self, step: MaskedStep) -> None:
        """Fill in latent and prediction, the clean stream's rows first: one pass of the decoder for both."""
        adversarial = View(step.visible, *step.mask, ADVERSARIAL)
        step.latent, step.prediction, _ = step.model(adversarial, beside=step.clean)

    def losses(self, step: MaskedStep) -> Losses:
        """Reconstruction of the clean image, and of the adversarial one."""
        assert step.whole is not None
        clean, adversarial = step.prediction.chunk(2)
        return {
            "reconstruction": (1.0, self.error(step, clean, step.batch.images, step.bare.patch_size)),
            "adversarial": (self.config.adversarial_weight, self.error(step, adversarial, as_images(step.whole), 1)),
        }

    def rows(self, step: MaskedStep) -> dict[str, Tensor]:
        """MAE's rows of the clean stream, the adversarial image and its own reconstruction."""
        assert step.whole is not None
        patches, norm_pix = patchify(step.batch.images, step.bare.patch_size), self.config.norm_pix_loss
        rows = step.pictures(step.clean[0], patches, norm_pix=norm_pix)
        adversarial = View(step.visible, step.mask.keep, None, ADVERSARIAL)
        own = step.pictures(adversarial, step.whole, norm_pix=norm_pix)
        return rows | {"adversarial": own["input"], "adv. reconstr.": own["reconstruction"]}


register(
    MethodEntry(
        "aemim", "pretrain", AemimConfig, Aemim, "AEMIM: clean and adversarial images, both reconstructed",
        adapters=True,
    )
)  # fmt: skip
