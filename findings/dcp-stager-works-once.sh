#!/usr/bin/env bash
# A stager of torch.distributed.checkpoint works once (torch 2.11.0)
#
# Guess: a DefaultStager that is handed to each async_save keeps its copy and is used again: that is what it is for, and its
#        documentation says to close it when it is no longer needed.
# Seen:  it closes itself behind the first save. The second one raises KeyError: <class 'type'> out of the copying.
# Hurt:  training that saves in the background with a stager of its own: the first checkpoint is there, the run ends at the second.
# Do:    a new stager for each save (2.14.1 uses one again).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.11.0 "numpy<2.4"
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

print("torch", torch.__version__.split("+")[0])
stager = DefaultStager(StagingOptions(False, False, False, False))
for name in ("first", "second"):
    try:
        dcp.async_save({"x": torch.ones(3)}, checkpoint_id=name, async_stager=stager, no_dist=True).result()
        print(name, "saved")
    except KeyError as error:
        print(name, "KeyError", error)
dcp.async_save({"x": torch.ones(3)}, checkpoint_id="third", no_dist=True).result()
print("third, with a stager of its own, saved")
PY
diff seen - <<'RECORDED'
torch 2.11.0
first saved
second KeyError <class 'type'>
third, with a stager of its own, saved
RECORDED
echo "seen as recorded"
