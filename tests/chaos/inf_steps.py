"""A training method whose batch holds an Inf in some steps: skipped, and nothing of it stays, whatever comes between.

`--import chaos.inf_steps --method pgd_inf`. Which steps is fixed, so that the undisturbed run skips the same ones.
"""

import math

from chaos.runs import INF_STEPS
from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.methods.classification import ClassificationConfig, Inputs, plain_losses
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.registry import MethodEntry, register


class PgdInf(Pgd):
    """PGD, with one Inf in the images of the training forward pass."""

    _bad = False

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of a batch."""
        self._bad = step in INF_STEPS
        return super().__call__(model, batch, seed=seed, step=step)

    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """As PGD's."""
        images = self.perturb(model, inputs).clone()
        if self._bad:
            images[0, 0, 0, 0] = math.inf
        return plain_losses(model, images, inputs)


register(MethodEntry("pgd_inf", "finetune", ClassificationConfig, PgdInf, "PGD with an Inf in some steps"))
