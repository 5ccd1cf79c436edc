#!/usr/bin/env bash
# layer_decay of timm's optimizer factory under a PyTorch scheduler (torch 2.14.1, timm 1.0.31)
#
# Guess: create_optimizer_v2(model, layer_decay=0.5) scales the learning rate of each layer, as its documentation says.
# Seen:  the factory only notes an lr_scale in each group; timm's schedulers multiply by it. With no scheduler, or with one of
#        torch.optim.lr_scheduler, the patch embedding takes the same step as the head, 8192 times what was asked for.
# Hurt:  whoever brings timm's optimizer into a loop of their own (Lightning, Accelerate): fine-tuning without layer decay,
#        logged with it; low layers of a pre-trained encoder are overwritten.
# Do:    step a timm.scheduler, or multiply lr by lr_scale in each group before the PyTorch scheduler is made.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler


def steps(scheduler):
    model = timm.create_model("vit_tiny_patch16_224")
    optimizer = create_optimizer_v2(model, "momentum", lr=1.0, momentum=0.0, weight_decay=0.0, layer_decay=0.5)
    if scheduler:
        scheduler(optimizer)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [-parameter.flatten()[0].item() for parameter in (model.patch_embed.proj.weight, model.head.weight)]


print("torch", torch.__version__.split("+")[0], "timm", timm.__version__)
print("first step of patch embedding and head")
print("no scheduler     ", steps(None))
print("PyTorch's cosine ", steps(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)))
print("timm's cosine    ", steps(lambda o: CosineLRScheduler(o, 10)))
PY
diff seen - <<'RECORDED'
torch 2.14.1 timm 1.0.31
first step of patch embedding and head
no scheduler      [1.0, 1.0]
PyTorch's cosine  [1.0, 1.0]
timm's cosine     [0.0001220703125, 1.0]
RECORDED
echo "seen as recorded"
