#!/usr/bin/env bash
# Inductor's graph cache and the CPU capability (torch 2.14.1; needs a C++ compiler and a processor with AVX2 or more)
#
# Guess: the key of the cache holds the instruction set, so a process under another ATEN_CPU_CAPABILITY compiles anew.
# Seen:  it does not. A graph cached with vector instructions is taken by a process under ATEN_CPU_CAPABILITY=default, whose
#        compiler stops at it ("at::vec has not been declared"); the other way round, the scalar graph is taken without a word.
# Hurt:  tests that let one machine stand for narrower processors: a compile error
#        that a second look cannot reproduce with an empty cache, or a slow graph with other roundings.
# Do:    give each capability its own TORCHINDUCTOR_CACHE_DIR.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1
cd "$dir"
unset ATEN_CPU_CAPABILITY
cat >compiled.py <<'PY'
import sys

import torch
from torch._dynamo.utils import counters

x = torch.linspace(0, 1, 4096).reshape(64, 64)
try:
    torch.compile(lambda x: (x.sin() + x.exp()).sum(-1))(x)
    cache = "hit" if counters["inductor"]["fxgraph_cache_hit"] else "miss"
    print(f"{sys.argv[1]}: compiled, graph cache {cache}")
except Exception as error:
    print(f"{sys.argv[1]}: raises, 'has not been declared': {'has not been declared' in str(error)}")
PY
in_process() { TORCHINDUCTOR_CACHE_DIR="$dir/$1" venv/bin/python -W ignore compiled.py "$2"; }
{
    in_process first "processor's own"
    ATEN_CPU_CAPABILITY=default in_process first "then default"
    ATEN_CPU_CAPABILITY=default in_process second "default"
    in_process second "then processor's own"
} >seen
diff seen - <<'RECORDED'
processor's own: compiled, graph cache miss
then default: raises, 'has not been declared': True
default: compiled, graph cache miss
then processor's own: compiled, graph cache hit
RECORDED
echo "seen as recorded"
