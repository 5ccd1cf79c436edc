#!/usr/bin/env bash
# One folder of images, two numberings of its classes (torchvision 0.29.1, timm 1.0.31)
#
# Guess: timm's folder reader and torchvision's ImageFolder give the same folder the same class numbers.
# Seen:  ImageFolder sorts names by character, timm sorts them naturally and without regard to case. Names with numbers
#        (1, 2, 10) or with mixed capitals (the cats and dogs of the Oxford pets) are numbered differently; synsets are not.
# Hurt:  a model fine-tuned with one loader and attacked with the other: some classes are swapped, nothing is raised, and low
#        clean and robust accuracy look like a fault of the training.
# Do:    save class_to_idx beside the checkpoint and compare; give timm a class_map, or look at clean accuracy per class.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import tempfile
from pathlib import Path

import timm
import torchvision
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

print("torchvision", torchvision.__version__.split("+")[0], "timm", timm.__version__)
for names in (
    ("class1", "class2", "class10"),
    ("Abyssinian", "american_bulldog", "Bengal"),
    ("n01440764", "n02102040", "n03888257"),
):
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            (Path(root) / name).mkdir()
            Image.new("RGB", (8, 8)).save(Path(root) / name / "0.png")
        print("torchvision", *ImageFolder(root).class_to_idx.items())
        print("timm       ", *create_dataset("", root=root).reader.class_to_idx.items())
PY
diff seen - <<'RECORDED'
torchvision 0.29.1 timm 1.0.31
torchvision ('class1', 0) ('class10', 1) ('class2', 2)
timm        ('class1', 0) ('class2', 1) ('class10', 2)
torchvision ('Abyssinian', 0) ('Bengal', 1) ('american_bulldog', 2)
timm        ('Abyssinian', 0) ('american_bulldog', 1) ('Bengal', 2)
torchvision ('n01440764', 0) ('n02102040', 1) ('n03888257', 2)
timm        ('n01440764', 0) ('n02102040', 1) ('n03888257', 2)
RECORDED
echo "seen as recorded"
