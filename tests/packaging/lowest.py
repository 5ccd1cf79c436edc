"""Install the oldest versions that pyproject.toml allows, and use every command with them.

    python tests/packaging/lowest.py

Not collected by pytest: it downloads packages and takes some minutes. torch and the other packages with compiled code
come from the environment this runs in (their old versions have no wheels for the newest NumPy and Python); what is
pure Python is installed at its lower bound, into a new environment that sees the others.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("train", "eval")
COMPILED = {"torch", "torchvision", "scikit-learn", "scipy", "matplotlib", "pillow", "safetensors"}
# They require torch, which must not be downloaded again.
WITHOUT_DEPENDENCIES = {"timm", "pyautoattack"}
SMALL = ("--model.encoder", "nano", "--model.patch_size", "8", "--max_steps", "3", "--batch_size", "16", "--device",
         "cpu", "--overwrite")  # fmt: skip


def lowest() -> dict[str, str]:
    """Package → its lower bound, of what is pure Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]
    found = {}
    for requirement in wanted:
        name = re.split(r"[\[<>=;]", requirement)[0]
        if name == "mimir-fast" or name in COMPILED:
            continue
        bound = re.search(r">=([\w.]+)", requirement)
        if bound is None:
            sys.exit(f"{requirement} has no lower bound: write the version it was tried with")
        found[name] = bound.group(1)
    return found


def run(*line: str, cwd: Path) -> str:
    """Run to the end, and stop everything if it fails."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment)
    if out.returncode:
        sys.exit(f"{' '.join(line)}\n{out.stdout[-4000:]}{out.stderr[-4000:]}")
    return out.stdout


def main() -> None:
    """Install, then pre-train, fine-tune, evaluate, compare, export and publish."""
    bounds = lowest()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        ours = Path(sys.executable).absolute().parents[1] / "lib" / site.parent.name / "site-packages"
        alone = [f"{n}=={v}" for n, v in bounds.items() if n in WITHOUT_DEPENDENCIES]
        others = [f"{n}=={v}" for n, v in bounds.items() if n not in WITHOUT_DEPENDENCIES]
        run(python, "-m", "pip", "install", "--quiet", *others, cwd=folder)
        # NumPy is compiled code, too: that of the other packages.
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "numpy", cwd=folder)
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", *alone, cwd=folder)
        (site / "borrowed.pth").write_text(f"{ours}\n")
        names = ", ".join(repr(n) for n in bounds)
        print(run(python, "-c", f"import importlib.metadata as m; print(*[n + ' ' + m.version(n) for n in ({names},)])",
                  cwd=folder).strip())  # fmt: skip

        def command(module: str, *args: str) -> str:
            print(module, flush=True)
            return run(python, "-m", f"mimir_fast.{module}", *args, cwd=folder)

        for module in ("command", "info", "recipes", "data.prepare", "reproduce"):
            command(module, "--help")
        command("command", "--print_completion", "bash")
        command("pretrain", "--recipe", "digits/mimir_vit_tiny", *SMALL, "--output_dir", "pre")
        command("finetune", "--recipe", "digits/pgd_vit_tiny", "--init", "pre", *SMALL, "--output_dir", "fine")
        command("evaluate", "--checkpoint", "fine", "--suite", "quick", "--limit", "16", "--device", "cpu")
        command("compare", "fine")
        command("export", "fine", "--output", "timm.safetensors")
        command("hub", "fine", "--output", "published")
        command("info")
    print("the lowest versions work")


if __name__ == "__main__":
    main()
