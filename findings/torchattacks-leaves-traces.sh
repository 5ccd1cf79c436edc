#!/usr/bin/env bash
# What an attack of torchattacks leaves behind in the model (torch 2.14.1, torchattacks 3.3.0)
#
# Guess: crafting adversarial images leaves the model as it was: the mode of each layer, and the gradients of its parameters.
# Seen:  1. A model in training mode with some layers held in eval (a frozen BatchNorm, say) comes back with every layer in
#        training mode. 2. CW, DeepFool and FAB add their own gradients to .grad of the parameters; FGSM, PGD and APGD do not.
# Hurt:  adversarial fine-tuning: the frozen BatchNorm starts to follow the batches after the first attack; a training loop
#        that calls zero_grad before the attack steps along the attack's gradient as well as its loss.
# Do:    attack first and zero_grad afterwards; set frozen layers to eval after every attack, not once.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 torchattacks==3.3.0 requests scipy tqdm
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
from importlib.metadata import version

import torch
import torchattacks
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
images = torch.rand(6, 3, 8, 8)

print("torch", torch.__version__.split("+")[0], "torchattacks", version("torchattacks"))
for name in ("FGSM", "PGD", "APGD", "CW", "DeepFool", "FAB"):
    model.train()
    model[1].eval()
    labels = model(images).argmax(1)
    model.zero_grad()
    getattr(torchattacks, name)(model)(images, labels)
    grads = any(p.grad is not None and p.grad.any() for p in model.parameters())
    print(f"{name}: frozen BatchNorm in training mode {model[1].training}, gradients left {grads}")

before = model[1].running_mean.clone()
model(images)
print("BatchNorm follows the next batch:", not torch.equal(before, model[1].running_mean))
PY
diff seen - <<'RECORDED'
torch 2.14.1 torchattacks 3.3.0
FGSM: frozen BatchNorm in training mode True, gradients left False
PGD: frozen BatchNorm in training mode True, gradients left False
APGD: frozen BatchNorm in training mode True, gradients left False
CW: frozen BatchNorm in training mode True, gradients left True
DeepFool: frozen BatchNorm in training mode True, gradients left True
FAB: frozen BatchNorm in training mode True, gradients left True
BatchNorm follows the next batch: True
RECORDED
echo "seen as recorded"
