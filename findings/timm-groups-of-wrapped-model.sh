#!/usr/bin/env bash
# Parameter groups that timm makes for a compiled model (torch 2.14.1, timm 1.0.31)
#
# Guess: create_optimizer_v2 makes the same groups for a model and for torch.compile(model): the same parameters.
# Seen:  compiling puts a prefix before each name, and timm's lists (no_weight_decay) and patterns (group_matcher) match from
#        the start of the name. Class token and position embedding silently get weight decay, and layer_decay puts all layers
#        into one; the second is logged, as if the model had no group_matcher.
# Hurt:  fine-tuning of masked autoencoders, which lives on layer decay: the scaled learning rates are gone with --compile.
# Do:    make the optimizer from the bare model and compile afterwards, or call model.compile(), which keeps the names.
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

print("torch", torch.__version__.split("+")[0], "timm", timm.__version__)
bare = timm.create_model("vit_tiny_patch16_224")
in_place = timm.create_model("vit_tiny_patch16_224")
in_place.compile()
for label, model in {"bare": bare, "torch.compile(model)": torch.compile(bare), "model.compile()": in_place}.items():
    names = {parameter: name for name, parameter in model.named_parameters()}
    for layer_decay in (None, 0.65):
        optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        decayed = [names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
        tokens = [name for name in decayed if name.endswith(("cls_token", "pos_embed"))]
        scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups}
        print(f"{label}, layer_decay {layer_decay}: {len(decayed)} decayed, with {tokens}; {len(scales)} learning rates")
PY
diff seen - <<'RECORDED'
torch 2.14.1 timm 1.0.31
bare, layer_decay None: 50 decayed, with []; 1 learning rates
bare, layer_decay 0.65: 50 decayed, with []; 14 learning rates
torch.compile(model), layer_decay None: 52 decayed, with ['_orig_mod.cls_token', '_orig_mod.pos_embed']; 1 learning rates
torch.compile(model), layer_decay 0.65: 52 decayed, with ['_orig_mod.cls_token', '_orig_mod.pos_embed']; 1 learning rates
model.compile(), layer_decay None: 50 decayed, with []; 1 learning rates
model.compile(), layer_decay 0.65: 50 decayed, with []; 14 learning rates
RECORDED
echo "seen as recorded"
