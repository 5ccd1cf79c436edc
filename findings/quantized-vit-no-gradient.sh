#!/usr/bin/env bash
# Attacking a dynamically quantized ViT (torch 2.14.1, timm 1.0.31)
#
# Guess: asking for the gradient to the image through quantize_dynamic raises (its layers have none), or it is close to the
#        gradient of the float model.
# Seen:  it raises only if the head is quantized too. With the head in float, as one often leaves it, the quantized layers
#        answer detached tensors and the residual connections carry on: with the class token the gradient to the image is
#        exactly zero, with average pooling it is that of a model without attention and MLP. The loss does depend on the image.
# Hurt:  robustness of compressed models: every gradient attack takes steps of nothing (or in a wrong direction), and
#        robust accuracy comes out as high as clean accuracy.
# Do:    craft the attack on the float model and evaluate it on the quantized one; compare one directional derivative with
#        finite differences; add a gradient-free attack.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import timm
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

labels = torch.arange(4)


def loss(model, images):
    return nn.functional.cross_entropy(model(images), labels)


def gradient(model, images):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(loss(model, images), images)[0]


print("torch", torch.__version__.split("+")[0], "timm", timm.__version__)
for pool in ("token", "avg"):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, global_pool=pool).eval()
    for module in model.modules():  # a fresh model hardly looks at its image
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    images = torch.rand(4, 3, 224, 224)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = quantize_dynamic(model, linear - {"head"})
    true, seen = gradient(model, images), gradient(quantized, images)
    step = 4 / 255 * true.sign()
    with torch.no_grad():
        moved = [(loss(m, images + step) - loss(m, images)).item() > 0 for m in (model, quantized)]
    print(f"{pool}: the float model's step raises the loss of the float, the quantized model: {moved}")
    print("    gradient of the quantized model zero:", not seen.any().item(), end="; ")
    cosine = nn.functional.cosine_similarity(true.flatten(), seen.flatten(), dim=0)
    print("cosine with the float one below 0.5:", cosine.item() < 0.5)
try:
    gradient(quantize_dynamic(model, linear), images)
except RuntimeError:
    print("head quantized too: raises")
PY
diff seen - <<'RECORDED'
torch 2.14.1 timm 1.0.31
token: the float model's step raises the loss of the float, the quantized model: [True, True]
    gradient of the quantized model zero: True; cosine with the float one below 0.5: True
avg: the float model's step raises the loss of the float, the quantized model: [True, True]
    gradient of the quantized model zero: False; cosine with the float one below 0.5: True
head quantized too: raises
RECORDED
echo "seen as recorded"
