#!/usr/bin/env bash
# LoRA on the qkv of timm's BEiT, EVA and Swin V2 (torch 2.14.1, timm 1.0.31, peft 0.21.2)
#
# Guess: LoraConfig(target_modules=["qkv"]) adapts the attention of every timm transformer that has a linear layer `qkv`.
# Seen:  BEiT, EVA and Swin V2 add their own bias and therefore read qkv.weight instead of calling qkv. peft lets the weight
#        of the wrapped layer through, so the adapter is never run: it gets no gradient, trains nothing, and changes the output
#        only when it is merged. It is counted as trainable and saved all the same; nothing warns.
# Hurt:  parameter-efficient (adversarial) fine-tuning: only the head learns, yet the report says LoRA; a random or borrowed adapter answers differently before and after merging.
# Do:    after one backward, assert that no lora_B has grad None; on these families target `proj`, `fc1`, `fc2`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31 peft==0.21.2
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import peft
import timm
import torch

print("torch", torch.__version__.split("+")[0], "timm", timm.__version__, "peft", peft.__version__)
for name, options in {
    "vit_tiny_patch16_224": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1)},
    "beit_base_patch16_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "swinv2_tiny_window8_256": {"depths": (1, 1)},
}.items():
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=10, **options).eval()
    for parameter in base.parameters():  # away from the zeros of a fresh model
        torch.nn.init.uniform_(parameter, 0.0 if parameter.ndim < 2 else -0.1, 0.1)
    images = torch.rand(2, *base.default_cfg["input_size"])
    with torch.no_grad():
        before = base(images)
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    adapted = model(images)
    adapted.square().sum().backward()
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    trained = sum(p.grad is not None for p in adapters)
    with torch.no_grad():
        merged = model.merge_and_unload()(images)

    def same(a, b):
        return "same" if torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item()) else "changed"

    print(f"{name}: {trained} of {len(adapters)} get a gradient; output {same(adapted, before)}, merged {same(merged, adapted)}")
PY
diff seen - <<'RECORDED'
torch 2.14.1 timm 1.0.31 peft 0.21.2
vit_tiny_patch16_224: 2 of 2 get a gradient; output changed, merged same
deit3_small_patch16_224: 2 of 2 get a gradient; output changed, merged same
swin_tiny_patch4_window7_224: 2 of 2 get a gradient; output changed, merged same
beit_base_patch16_224: 0 of 2 get a gradient; output same, merged changed
eva02_tiny_patch14_224: 0 of 2 get a gradient; output same, merged changed
swinv2_tiny_window8_256: 0 of 2 get a gradient; output same, merged changed
RECORDED
echo "seen as recorded"
