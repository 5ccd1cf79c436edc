#!/usr/bin/env bash
# Forward-mode derivative of a torch.library.custom_op (torch 2.14.1)
#
# Guess: an operator that registers only register_autograd (a backward) raises in forward mode, as an autograd.Function
#        without a jvp does.
# Seen:  torch.func.jvp and jacfwd answer zeros, and a dual number comes out without its tangent; nothing is raised or warned.
# Hurt:  whoever measures Jacobians, Lipschitz constants or the local linearity of a robust model that holds one custom
#        operator: a residual block keeps the tangent of its skip connection, so the answer is wrong but not suspicious.
# Do:    compare one jvp with a vjp (u·Jv from both sides) before trusting it, or take reverse mode; write the operator as an
#        autograd.Function with a jvp if forward mode is needed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.library.custom_op("findings::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return 3 * x**2 * grad


cube.register_autograd(backward, setup_context=save)


class Cube(torch.autograd.Function):
    forward = staticmethod(lambda x: x**3)
    setup_context = staticmethod(save)
    backward = staticmethod(backward)


x, v = torch.tensor([1.0, 2.0]), torch.ones(2)
print("torch", torch.__version__.split("+")[0])
_, vjp = torch.autograd.functional.vjp(cube, x, v)
print("vjp, custom_op              ", vjp.tolist())
print("jvp, custom_op              ", torch.func.jvp(cube, (x,), (v,))[1].tolist())
print("jvp, x + custom_op          ", torch.func.jvp(lambda x: x + cube(x), (x,), (v,))[1].tolist())
print("jacfwd, custom_op           ", torch.func.jacfwd(cube)(x).tolist())
with forward_ad.dual_level():
    print("tangent, custom_op          ", forward_ad.unpack_dual(cube(forward_ad.make_dual(x, v))).tangent)
try:
    torch.func.jvp(Cube.apply, (x,), (v,))
except Exception as error:
    print("jvp, autograd.Function       raises", type(error).__name__)
PY
diff seen - <<'RECORDED'
torch 2.14.1
vjp, custom_op               [3.0, 12.0]
jvp, custom_op               [0.0, 0.0]
jvp, x + custom_op           [1.0, 1.0]
jacfwd, custom_op            [[0.0, 0.0], [0.0, 0.0]]
tangent, custom_op           None
jvp, autograd.Function       raises NotImplementedError
RECORDED
echo "seen as recorded"
