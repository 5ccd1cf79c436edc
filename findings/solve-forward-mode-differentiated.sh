#!/usr/bin/env bash
# The forward-mode derivative of torch.linalg.solve, differentiated once more (torch 2.14.1)
#
# Guess: all four orders (reverse twice, forward over reverse, reverse over forward, forward twice) give one Hessian.
# Seen:  where the matrix of the system depends on the input, the two orders that start with forward mode are wrong by a
#        third and more, without a word and still symmetric. With a matrix that stands still, or by torch.linalg.inv, all agree.
# Hurt:  Hessians and curvature of losses with a linear system inside, such as nHSIC, CCA, Gaussian processes or ridge
#        regression, by torch.func.jacfwd(jacfwd), or jvp of a jvp.
# Do:    take the outer derivative by forward mode and the inner by reverse (torch.func.hessian does), or use inv or Cholesky.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.14.1
cd "$dir"
venv/bin/python -W ignore - >seen <<'PY'
import torch
from torch.func import jacfwd, jacrev

generator = torch.Generator().manual_seed(0)
x, fixed = (torch.rand(4, 4, dtype=torch.double, generator=generator) for _ in range(2))
eye = torch.eye(4, dtype=torch.double)


def gram(x):
    return x @ x.T


systems = {
    "matrix depends on x": lambda x: torch.linalg.solve(gram(x) + eye, fixed),
    "right side depends on x": lambda x: torch.linalg.solve(gram(fixed) + eye, gram(x)),
    "both, by the inverse": lambda x: torch.linalg.inv(gram(x) + eye) @ gram(x),
}
orders = {
    "forward over reverse": lambda f: jacfwd(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "forward twice": lambda f: jacfwd(jacfwd(f)),
}
print("torch", torch.__version__.split("+")[0])
for name, system in systems.items():
    def value(x):
        return system(x).square().sum()

    exact = jacrev(jacrev(value))(x)
    step = 1e-6 * torch.eye(16, dtype=torch.double).view(16, 4, 4)
    measured = torch.stack([(jacrev(value)(x + d) - jacrev(value)(x - d)) / 2e-6 for d in step]).view(4, 4, 4, 4)
    assert torch.allclose(exact, measured, rtol=1e-5, atol=1e-6)
    for order, hessian in orders.items():
        error = ((hessian(value)(x) - exact).norm() / exact.norm()).item()
        print(f"{name}, {order}:", "right" if error < 1e-10 else "wrong by more than a third" if error > 1 / 3 else "wrong")
PY
diff seen - <<'RECORDED'
torch 2.14.1
matrix depends on x, forward over reverse: right
matrix depends on x, reverse over forward: wrong by more than a third
matrix depends on x, forward twice: wrong by more than a third
right side depends on x, forward over reverse: right
right side depends on x, reverse over forward: right
right side depends on x, forward twice: right
both, by the inverse, forward over reverse: right
both, by the inverse, reverse over forward: right
both, by the inverse, forward twice: right
RECORDED
echo "seen as recorded"
