"""`python -m mimir_fast.info`: which backends run here, at which versions, and the clashes known to us."""

import argparse
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator

import mimir_fast
from mimir_fast.completion import SHELLS, script
from mimir_fast.versions import PACKAGES, called_as, dali_package, version_of


def backends() -> dict[str, str]:
    """What each fast path can do here: `yes`, `yes: …` or `no: why`."""
    import torch

    from mimir_fast.layers.attention import xformers_failure

    cuda = torch.cuda.is_available()
    failure = xformers_failure()
    return {
        "CUDA": f"yes: {torch.cuda.get_device_name()}" if cuda else "no: torch sees no GPU (everything runs on CPU)",
        "C++ ops (mimir_fast._C)": _native(),
        "Triton kernels": _triton(cuda),
        "xformers attention": "yes" if failure is None else f"no: {failure}; attention is chosen among the others",
        "DALI": _dali(cuda),
        "NVIDIA apex": _apex(),
    }


def _native() -> str:
    if importlib.util.find_spec("mimir_fast._C") is None:
        return "no: not built (no compiler at install time?); the PyTorch definitions are used"
    try:
        importlib.import_module("mimir_fast._C")
    except ImportError as error:
        return f"no: {error}; reinstall mimir-fast"
    from mimir_fast import _native

    if _native.library() is None:
        return "no: turned off by MIMIR_FAST_NATIVE=0"
    by = ", by MIMIR_FAST_CPU" if os.environ.get("MIMIR_FAST_CPU") else ""
    return f"yes: instructions up to {_native.unit()}{by}"


def _triton(cuda: bool) -> str:
    import torch

    if importlib.util.find_spec("triton") is None:
        return "no: triton is not installed"
    if torch.version.hip:
        return "no: of no use to an AMD GPU, where PyTorch computes"
    return "yes" if cuda else "compile and interpret only: no GPU"


def _dali(cuda: bool) -> str:
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return f"no: pip install {dali_package()} (the PyPI package `nvidia-dali` is a placeholder)"
    try:
        importlib.import_module("nvidia.dali.fn")
    except ImportError as error:
        return f"no: {error}"
    return "yes" if cuda else "yes: CPU pipelines"


def _apex() -> str:
    from mimir_fast.training.optimizer import nvidia_apex

    try:
        nvidia_apex()
    except ImportError as error:
        return f"no: {error}"
    return "yes"


def clashes() -> Iterator[str]:
    """Combinations of packages that do not work together, found here."""
    torch_version, vision_version = version_of("torch") or "", version_of("torchvision")
    if "+cpu" in torch_version and vision_version and "+cpu" not in vision_version:
        yield (
            "a CPU-only torch wheel beside the index's torchvision: `operator torchvision::nms does not exist`; "
            "install torch's default build (it runs on CPU too)"
        )
    if version_of("nvidia-dali") and not (version_of("nvidia-dali-cuda130") or version_of("nvidia-dali-cuda120")):
        yield f"`nvidia-dali` is a placeholder package: pip install {dali_package()}"
    if version_of("apex") and _apex() != "yes":
        yield "the installed `apex` is not NVIDIA's: pip uninstall apex"
    if version_of("robustbench"):
        yield f"robustbench pins an old timm; timm {version_of('timm')} is what is tested here"
    if version_of("autoattack"):
        yield "`autoattack` is not the maintained package of its authors: pip install 'pyautoattack<0.3'"


def main() -> None:
    """The command: print backends, packages and known clashes."""
    # Not tyro: this command says what is missing, so it needs nothing.
    parser = argparse.ArgumentParser(
        prog=called_as("python -m mimir_fast.info"), description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--print_completion", metavar="bash|zsh", choices=SHELLS, help="a script for the shell")
    if shell := parser.parse_args().print_completion:
        print(script(shell))
        return
    print(f"mimir_fast {mimir_fast.__version__}   Python {platform.python_version()}   {platform.platform()}")
    print("\nbackends")
    for name, state in backends().items():
        print(f"  {name:26} {state}")
    print("\npackages")
    for package in PACKAGES:
        print(f"  {package:26} {version_of(package) or '-'}")
    found = list(clashes())
    print("\nknown clashes: " + ("none" if not found else ""))
    for clash in found:
        print(f"  ! {clash}")


if __name__ == "__main__":
    main()
