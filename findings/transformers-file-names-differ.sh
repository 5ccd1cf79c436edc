#!/usr/bin/env bash
# The names in a ViT's state dict and in the file of save_pretrained (transformers 5.24.0, torch 2.14.1)
#
# Guess: save_pretrained writes the tensors under the names of model.state_dict(), as transformers 4 did, so that
#        load_state_dict(load_file("model.safetensors")) of the same class fills the model.
# Seen:  live models have new names (layers.0.attention.q_proj); files keep the old ones (encoder.layer.0.attention.attention.query).
#        Of 40 tensors of a ViT 8 have the same name. With strict=False the others stay random, and nothing is said but in the
#        return value. from_pretrained reads either kind.
# Hurt:  scripts that load an encoder with strict=False (the usual way to leave a head out) fine-tune a nearly random one;
#        converters written for the Hub's files skip a torch.save(model.state_dict()), and the other way round.
# Do:    load by from_pretrained; elsewhere count what was loaded, and accept both sets of names.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 transformers==5.24.0
cd "$dir"
venv/bin/python -W ignore - >seen 2>log <<'PY'
import torch
import transformers
from safetensors.torch import load_file
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

print("torch", torch.__version__.split("+")[0], "transformers", transformers.__version__)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
decoder = dict(decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=64)
for kind, config in ((ViTModel, ViTConfig(**sizes)), (ViTMAEForPreTraining, ViTMAEConfig(**sizes, **decoder))):
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained("saved")
    file, live = load_file("saved/model.safetensors"), model.state_dict()
    other = kind(config).eval()
    missing, unexpected = other.load_state_dict(file, strict=False)
    back = kind.from_pretrained("saved").state_dict()
    same = all(torch.equal(live[name], back[name]) for name in live)
    print(f"{kind.__name__}: {len(file.keys() & live.keys())} of {len(live)} names are the same; strict=False leaves "
          f"{len(missing)} random; from_pretrained is {'right' if same else 'wrong'}")
PY
diff seen - <<'RECORDED'
torch 2.14.1 transformers 5.24.0
ViTModel: 8 of 40 names are the same; strict=False leaves 32 random; from_pretrained is right
ViTMAEForPreTraining: 14 of 78 names are the same; strict=False leaves 64 random; from_pretrained is right
RECORDED
echo "seen as recorded"
