"""Build wheel and sdist, list their files, install both in clean environments, and use them from another folder.

    python tests/packaging/check.py

The sdist is installed where there is no compiler: the ops must still work, and say so.
Not collected by pytest: it takes about a minute. torch comes from the environment this runs in (2 GB need not be
installed twice): the new environment sees those packages, but not our source tree.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WANTED_IN_WHEEL = (
    "mimir_fast/__init__.py", "mimir_fast/py.typed", "mimir_fast/ops/hsic.py", "mimir_fast/recipes/digits.py",
    "mimir_kernels/__init__.py", "mimir_kernels/pair_sums.py",
)  # fmt: skip
WANTED_IN_SDIST = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/bindings.cpp", "csrc/functions.h", "CITATION.cff",
    "SECURITY.md",
)  # fmt: skip
USE = """
import torch, mimir_fast, mimir_kernels
from mimir_fast import hsic, nhsic, renyi_mi, cka, linf_step, HSICLoss
assert "site-packages" in mimir_fast.__file__, mimir_fast.__file__
x = torch.randn(16, 3, 8, 8, requires_grad=True)
y = torch.randn(16, 5)
loss = hsic(x, y) + HSICLoss()(x, y) + renyi_mi(x, y) + nhsic(x, y) + cka(x, y)
loss.backward()
assert x.grad.isfinite().all()
linf_step(x.detach().clamp(0, 1), x.grad, x.detach().clamp(0, 1), alpha=2 / 255, eps=8 / 255)
print("used:", mimir_fast.__version__)
"""


def run(*line: str, cwd: Path, **environment: str) -> str:
    """What the command prints, on stdout and then on stderr."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    out = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment)
    if out.returncode:
        sys.exit(f"{' '.join(line)}\n{out.stdout}{out.stderr}")
    return out.stdout + out.stderr


def without_optimiser(folder: Path) -> dict[str, str]:
    """Compilers that take half the time: what they make computes a few numbers."""
    found = {}
    for variable, compiler in (("CC", "cc"), ("CXX", "c++")):
        script = folder / f"quick-{compiler}"
        script.write_text(f'#!/bin/sh\nexec {os.environ.get(variable, compiler)} "$@" -O0\n')  # the last one counts
        script.chmod(0o755)
        found[variable] = str(script)
    return found


def install(what: Path, folder: Path, **environment: str) -> str:
    """The Python of a new environment that has `what`, and sees the packages of this one but not our source tree."""
    venv.create(folder)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]  # to install another one takes longer than all of this
    run(*pip, "install", "--quiet", "--no-deps", str(what), cwd=folder, **environment)
    site = next((folder / "lib").glob("python*/site-packages"))
    ours = Path(sys.executable).absolute().parents[1] / "lib" / site.parent.name / "site-packages"
    (site / "borrowed.pth").write_text(f"{ours}\n")
    return python


def main() -> None:
    """Build, look, install, use."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)]
        run(*build, cwd=folder, **without_optimiser(folder))
        (wheel,) = (folder / "dist").glob("*.whl")
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        inside = zipfile.ZipFile(wheel).namelist()
        missing = [want for want in WANTED_IN_WHEEL if want not in inside]
        native = [name for name in inside if name.startswith("mimir_fast/_C.")]
        strays = sorted({n.split("/")[0] for n in inside} - {"mimir_fast", "mimir_kernels"})
        strays = [s for s in strays if not s.endswith(".dist-info")]
        if missing or not native or strays:
            sys.exit(f"wheel: missing {missing}, native {native}, strays {strays}")
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        if f"-{tag}-{tag}-linux_" not in wheel.name:
            sys.exit(f"wheel: {wheel.name} is not tagged for {tag} on Linux")
        with tarfile.open(sdist) as archive:
            in_sdist = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
        if lost := [want for want in WANTED_IN_SDIST if want not in in_sdist]:
            sys.exit(f"sdist: missing {lost}")
        print(f"{wheel.name}: {len(inside)} files, {native[0]}; sdist: {len(in_sdist)} files")

        python = install(wheel, folder / "venv")
        print(run(python, "-W", "error", "-c", USE, cwd=folder).strip())
        script = str(Path(python).with_name("mimir-fast"))
        if not run(script, "--help", cwd=folder).startswith("usage: mimir-fast COMMAND"):
            sys.exit("mimir-fast --help says something else")
        print(run(script, "info", cwd=folder).splitlines()[0])

        without = {"CC": "/bin/false", "CXX": "/bin/false", "MIMIR_FAST_REQUIRE": ""}
        python = install(sdist, folder / "without", **without)
        said = run(python, "-c", USE, cwd=folder, **without)
        info = run(python, "-m", "mimir_fast.info", cwd=folder, **without)
        if "C++ ops of mimir_fast are not there" not in said or "no: not built" not in info:
            sys.exit(f"without a compiler nothing is said of it: {said}{info}")
        print("without a compiler:", next(line for line in said.splitlines() if "C++ ops" in line))


if __name__ == "__main__":
    main()
