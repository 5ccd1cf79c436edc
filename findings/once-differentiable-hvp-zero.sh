#!/usr/bin/env bash
# A backward marked once_differentiable, differentiated twice (torch 2.14.1)
#
# Guess: every way of differentiating such a function twice raises; that is what the decorator is for.
# Seen:  the error waits behind gradients that themselves require grad. torch.autograd.grad(..., create_graph=True) hands in
#        plain ones, so the first gradient comes back detached: hvp, vhp and hessian answer zeros, and a gradient penalty
#        quietly loses the term of that function while the other terms keep theirs.
# Hurt:  gradient penalties, curvature regularisers and Hessian probes over models with a custom kernel: most kernels with a
#        hand-written backward carry this decorator.
# Do:    pass strict=True to torch.autograd.functional, assert that the first gradient has a grad_fn, or check one second
#        derivative against finite differences.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import torch
from torch.autograd import functional
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def cubes(x):
    return Cube.apply(x).sum()


def penalty(function):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad((x**2).sum() + function(x), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0].tolist()


x, v = torch.tensor([1.0, 2.0]), torch.ones(2)
print("torch", torch.__version__.split("+")[0])
print("second derivative    ", (6 * x).tolist())
print("hvp                  ", functional.hvp(cubes, x, v)[1].tolist())
print("hessian              ", functional.hessian(cubes, x).tolist())
try:
    functional.hvp(cubes, x, v, strict=True)
except RuntimeError:
    print("hvp, strict           raises")
print("penalty, built in    ", penalty(lambda x: (x**3).sum()))
print("penalty, once        ", penalty(cubes))
PY
diff seen - <<'RECORDED'
torch 2.14.1
second derivative     [6.0, 12.0]
hvp                   [0.0, 0.0]
hessian               [[0.0, 0.0], [0.0, 0.0]]
hvp, strict           raises
penalty, built in     [80.0, 448.0]
penalty, once         [20.0, 64.0]
RECORDED
echo "seen as recorded"
