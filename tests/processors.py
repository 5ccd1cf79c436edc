"""The tests of ops, layers and models as other processors and other versions of PyTorch run them.

    python tests/processors.py --one       the leg that CI runs beside all tests: a processor with fewer instructions
    python tests/processors.py             every leg that this processor can run
    python tests/processors.py tests/ops/test_hsic.py -x   some tests only; what else is given is pytest's
    python tests/processors.py --torches   the lowest PyTorch of pyproject.toml and the newest that pip finds, too

Not collected by pytest. A leg holds PyTorch, oneDNN and our C++ to the instructions of one kind of processor. It has
caches of its own: torch 2.14 hands a graph that it compiled with wider instructions to a process without them, where it
computes wrong numbers. Each PyTorch goes into a new environment (7 GB), one after the other, removed afterwards.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [f"tests/{name}" for name in ("ops", "layers", "models") if (ROOT / "tests" / name).is_dir()]
# MIMIR_FAST_CPU (what our kernels use): what PyTorch, oneDNN and MKL may use then.
UNITS = {
    "none": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512-bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}
PRETRAINING = ["-m", "mimir_fast.pretrain", "--recipe", "digits/mimir_vit_nano", "--max_steps", "20"]

Environment = dict[str, str]


def legs() -> dict[str, Environment]:
    """Name → variables: the definitions without our C++, then every unit of this processor, the widest last."""
    ask = "from mimir_fast import _native; print(_native.run('widest_unit') if _native.library() else '')"
    line = [sys.executable, "-c", ask]
    widest = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    found = {"definitions": {"MIMIR_FAST_NATIVE": "0"}}
    for unit in list(UNITS)[: list(UNITS).index(widest) + 1 if widest else 0]:
        aten, onednn, mkl = UNITS[unit]
        found[unit] = {
            "MIMIR_FAST_CPU": unit, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn,
            "MKL_ENABLE_INSTRUCTIONS": mkl,
        }  # fmt: skip
    return found


def tests(name: str, python: Path, environment: Environment, *extra: str) -> bool:
    """Whether the tests pass there; their output is shown."""
    with tempfile.TemporaryDirectory(prefix="mimir-fast-leg-") as folder:
        own = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "MIMIR_FAST_CACHE": f"{folder}/mimir_fast"}
        own["MIMIR_FAST_REQUIRE"] = ""  # a leg lacks things on purpose
        chosen = [] if any(argument.startswith("tests/") for argument in extra) else FOLDERS
        line = [str(python), "-m", "pytest", "-q", "-n", "auto", "--dist", "loadgroup", *chosen, *extra]
        return run(name, line, environment | own)


def run(name: str, line: list[str], environment: Environment) -> bool:
    print(f"\n== {name}: {' '.join(f'{k}={v}' for k, v in environment.items())} {' '.join(line)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(line, cwd=ROOT, env=os.environ | environment).returncode
    print(f"== {name}: {'passed' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def requirements(project: dict[str, Any], extra: str) -> list[str]:
    """Of an extra, and of our own extras that it names."""
    found = []
    for requirement in project["optional-dependencies"][extra]:
        ours = re.fullmatch(r"mimir-fast\[(.*)\]", requirement)
        found += [r for name in ours[1].split(",") for r in requirements(project, name)] if ours else [requirement]
    return found


def torches(extra: list[str]) -> dict[str, bool]:
    """The same tests and a short pre-training with the lowest and the newest PyTorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (lowest,) = (r.removeprefix("torch>=") for r in project["dependencies"] if r.startswith("torch>="))
    packages = [*requirements(project, "train"), *requirements(project, "dev")]
    passed = {}
    # The interpreter of Triton 3.6, which comes with torch 2.11, makes numbers of arrays: NumPy 2.4 refuses that.
    for wanted, beside in ((f"torch=={lowest}.*", ["numpy<2.4"]), ("torch", [])):
        with tempfile.TemporaryDirectory(prefix="mimir-fast-torch-") as folder:
            venv.create(folder, with_pip=True)
            python = Path(folder) / "bin" / "python"
            # A constraint of this machine does not say which version is the newest.
            pip = {"PIP_CONFIG_FILE": os.environ.get("PIP_CONFIG_FILE", os.devnull)}
            install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", wanted, *beside, *packages]
            # Our own code from here: the C++ extension is built without torch, so one fits all.
            here = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
            passed[wanted] = (
                run(f"{wanted}, installation", install, pip)
                and tests(wanted, python, here, *extra)
                and run(wanted, [str(python), *PRETRAINING, "--output_dir", f"{folder}/run"], here)
            )
    return passed


def main() -> None:
    """Run what is asked for; exit status 1 if anything fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--one", action="store_true", help="the leg one step below this processor")
    parser.add_argument("--torches", action="store_true", help="the lowest and the newest PyTorch, too")
    arguments, extra = parser.parse_known_args()  # what else is given is pytest's
    chosen = legs()
    if arguments.one:
        names = list(chosen)
        # AVX2 is what most processors with less than AVX-512 have.
        name = "avx2" if "avx2" in names[:-1] else names[-2] if len(names) > 1 else names[0]
        chosen = {name: chosen[name]}
    print("legs:", ", ".join(chosen), flush=True)
    passed = {name: tests(name, Path(sys.executable), environment, *extra) for name, environment in chosen.items()}
    if arguments.torches:
        passed |= torches(extra)
    print("\n" + "\n".join(f"{name:12} {'passed' if ok else 'FAILED'}" for name, ok in passed.items()))
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
