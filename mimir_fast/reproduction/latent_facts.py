"""What a pre-trained latent holds: of the image, of the perturbation, and in how many directions.

Images are attacked as in pre-training, adv-MAE's attack on the model itself, whatever it was trained by, with one mask
and one start for all models. Shapes: B images, K visible patches, P numbers a patch, D width.
"""

from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig
from mimir_fast.data import Batch
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.methods.masks import Mask
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.file_names import from_files
from mimir_fast.models.masked_model import MaskedModel, View, build_masked_model
from mimir_fast.models.weight_files import read_weights
from mimir_fast.ops.cka import cka
from mimir_fast.ops.hsic import hsic
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.training.pretraining import PretrainConfig

RIDGE = 1e-3  # of the mean square of a feature
SAMPLES = 128  # an estimate's, as in training: all three depend on it


def latent_facts(config: PretrainConfig, run: Path, images: EvaluationImages, eps: float) -> dict[str, float]:
    """{"nhsic", "hsic", "cka", "delta_r2", "image_r2", "rank"} of a run's last weights.

    nHSIC, HSIC and CKA (both of the median's width) are between the adversarial image and the latent, means over groups
    of 128. `delta_r2` and `image_r2` are by ridge regression from a visible patch's token to its perturbation, and to
    its clean pixels: the share of variance explained on the half of the images that was not fitted. Each model is
    attacked by itself, so `delta_r2` does not compare models: `same_delta` does. `rank` is the
    exponential of the entropy of the tokens' normalised principal variances (Roy & Vetterli, EUSIPCO 2007).
    """
    model = pretrained(config, run)
    step = attacked(model, images, eps)
    latent = latent_of(model, step.visible, step.mask)
    image = Mimir(MimirConfig()).image_side(step)
    tokens = latent[:, model.encoder.num_prefix :]
    clean = patchify_gather(step.batch.images, step.mask.keep, model.patch_size)
    groups = [(x.flatten(1), z.flatten(1)) for x, z in zip(image.split(SAMPLES), latent.split(SAMPLES), strict=True)]
    groups = [group for group in groups if len(group[0]) == SAMPLES] or groups

    def over_groups(values: list[Tensor]) -> float:
        return float(torch.stack(values).mean())

    return {
        "nhsic": over_groups([nhsic(x, z) for x, z in groups]),
        "hsic": over_groups([hsic(x, z, bandwidth="median") for x, z in groups]),
        "cka": over_groups([cka(x, z, bandwidth="median") for x, z in groups]),
        "delta_r2": explained(tokens, step.visible - clean),
        "image_r2": explained(tokens, clean),
        "rank": effective_rank(tokens.flatten(0, 1)),
    }


def pretrained(config: PretrainConfig, run: Path) -> MaskedModel:
    """The model of a run's last weights, in eval mode."""
    model = build_masked_model(config.model, config.data.image_size, config.data.channels)
    model.load_state_dict(from_files(model, read_weights(run, "model").tensors))
    return model.eval()


@torch.no_grad()
def latent_of(model: MaskedModel, visible_BKP: Tensor, mask: Mask) -> Tensor:
    """(B, T, D) fp32 of the visible patches, with the tokens in front."""
    return model.visible(model(View(visible_BKP, *mask), decode=False), mask.keep).float()


def attacked(model: MaskedModel, images: EvaluationImages, eps: float) -> MaskedStep:
    """A step whose visible patches are attacked, with the mask and start of step 0 of seed 0."""
    zeros = torch.zeros_like(images.samples)
    step = MaskedStep(model, Batch(images.images, images.labels, images.samples, zeros), 0, 0)
    Mimir(MimirConfig(attack=ReconstructionAttackConfig(eps=eps))).prepare(step)
    return step


def explained(features_BKD: Tensor, targets_BKP: Tensor) -> float:
    """R² of a linear map, one for all patches, fitted on every second image and judged on the others; below 0 where
    the mean is nearer."""
    fit, test = slice(0, None, 2), slice(1, None, 2)
    x, y = features_BKD[fit].flatten(0, 1).double(), targets_BKP[fit].flatten(0, 1).double()
    centre, offset = x.mean(0), y.mean(0)
    x = x - centre
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-30))
    weights = torch.linalg.solve(gram, x.T @ (y - offset))
    truth = targets_BKP[test].flatten(0, 1).double()
    error = truth - offset - (features_BKD[test].flatten(0, 1).double() - centre) @ weights
    return 1 - float(error.square().sum() / (truth - offset).square().sum().clamp_min(1e-30))


def effective_rank(rows_ND: Tensor) -> float:
    """exp of the entropy of the normalised variances along principal axes: 1 to D; 0 where nothing varies."""
    x = rows_ND.double() - rows_ND.double().mean(0)
    variances = torch.linalg.eigvalsh(x.T @ x).clamp_min(0)
    if not float(variances.sum()) > 0:
        return 0.0
    shares = variances / variances.sum()
    return float(torch.special.entr(shares).sum().exp())
