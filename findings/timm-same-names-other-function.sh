#!/usr/bin/env bash
# Vision transformers of timm whose state dict is a plain ViT's, and whose function is not (timm 1.0.31, torch 2.14.1)
#
# Guess: what a block computes shows in the names or shapes of its tensors, so that a state dict which loads strictly into
#        timm's VisionTransformer of the same sizes gives the same features.
# Seen:  vit_base_patch16_rpn_224 (norms behind attention and MLP, in the residual) has exactly the names and shapes of a
#        pre-norm ViT without biases of queries, keys and values: strict loading passes, features are another function's. The
#        clip_quickgelu models load strictly too; only the activation differs.
# Hurt:  converters, attack and probing code that recognise a ViT by its tensors: robustness and transfer numbers of a network
#        that nobody trained.
# Do:    keep the model's name or its block's class and activation with the weights; ask for them where a file has neither.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

print("torch", torch.__version__.split("+")[0], "timm", timm.__version__)
for name in ("vit_base_patch16_224", "vit_base_patch16_rpn_224", "vit_base_patch32_clip_quickgelu_224"):
    model = timm.create_model(name, num_classes=10, depth=2).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():  # away from the zeros and ones of a fresh model
        torch.nn.init.uniform_(parameter, *((0.0, 1.0) if parameter.ndim < 2 else (-0.05, 0.05)))
    plain = VisionTransformer(
        patch_size=model.patch_embed.patch_size[0], embed_dim=768, depth=2, num_heads=12, num_classes=10,
        class_token=model.cls_token is not None, global_pool=model.global_pool,
        pre_norm="norm_pre.weight" in model.state_dict(), qkv_bias=model.blocks[0].attn.qkv.bias is not None,
        fc_norm="fc_norm.weight" in model.state_dict(),
    ).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), plain.forward_features(images)
    difference = ((theirs - ours).norm() / theirs.norm()).item()
    print(f"{name}: loads strictly; features {'equal' if difference < 1e-5 else 'differ'}"
          + (" by more than 10 %" if difference > 0.1 else ""))
PY
diff seen - <<'RECORDED'
torch 2.14.1 timm 1.0.31
vit_base_patch16_224: loads strictly; features equal
vit_base_patch16_rpn_224: loads strictly; features differ by more than 10 %
vit_base_patch32_clip_quickgelu_224: loads strictly; features differ
RECORDED
echo "seen as recorded"
