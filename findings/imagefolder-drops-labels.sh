#!/usr/bin/env bash
# A folder inside one class folder, and all labels are gone (datasets 5.2.0, torchvision 0.29.1)
#
# Guess: Hugging Face's imagefolder labels cat/sub/x.jpg as torchvision's ImageFolder does, by cat, or else by sub.
# Seen:  one nested folder anywhere, and the data set has no column `label` at all: no error, no warning. If all images are
#        nested alike, the labels are the innermost folders' names. torchvision labels by the folder below the root in both.
# Hurt:  images sorted by class and then by camera or scene: training by label ends with a KeyError at best, with the
#        classes `left` and `right` instead of `cat` and `dog` at worst.
# Do:    look at `features["label"].names`; write a metadata.csv, or keep class folders flat.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 datasets==5.2.0 pillow==13.0.0
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache"
venv/bin/python -W ignore - >seen <<'PY'
from pathlib import Path

import datasets
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "torchvision", torchvision.__version__.split("+")[0])
for case, names in {
    "flat": ("cat/1", "dog/2"),
    "one nested": ("cat/1", "cat/left/2", "dog/3"),
    "all nested": ("cat/left/1", "cat/right/2", "dog/left/3"),
}.items():
    root = Path(case.replace(" ", "-"))
    for name in names:
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "train" / f"{name}.png")
    features = datasets.load_dataset("imagefolder", data_dir=str(root), split="train").features
    theirs = features["label"].names if "label" in features else "no labels"
    print(f"{case}: datasets {theirs}, torchvision {ImageFolder(root / 'train').classes}")
PY
diff seen - <<'RECORDED'
datasets 5.2.0 torchvision 0.29.1
flat: datasets ['cat', 'dog'], torchvision ['cat', 'dog']
one nested: datasets no labels, torchvision ['cat', 'dog']
all nested: datasets ['left', 'right'], torchvision ['cat', 'dog']
RECORDED
echo "seen as recorded"
