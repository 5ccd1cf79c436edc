"""The two packages and the optional C++ extension; everything else is in pyproject.toml.

`mimir_fast` is the package; `mimir_kernels` (Triton) lies in kernels/ because the import name `kernels` is taken by
another project. csrc/ becomes `mimir_fast._C` with pybind11 and OpenMP; torch is not needed to build it. Without a
compiler the install goes on and the ops run their PyTorch definitions (`python -m mimir_fast.info` says so).
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, has_flag
from setuptools import find_packages, setup

# No -march: hot functions are compiled several times and chosen at load time (csrc/multiversion.h), so that the wheel
# runs on any x86-64. No contraction: a fused multiply-add rounds once where the definitions round twice.
COMPILE_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fopenmp"]

JOBS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ParallelCompile("MIMIR_FAST_BUILD_JOBS", default=JOBS).install()


def announce(text: str) -> None:
    """Say it where somebody is watching: pip shows nothing of what a build prints (but with -v, or when it fails)."""
    print(text, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{text}\n")
    except OSError:  # nobody is
        pass


COMPILE_SECONDS = 90  # of one core for all files


class OptionalBuildExt(build_ext):
    """An extension that fails to compile is reported, not fatal, unless MIMIR_FAST_REQUIRE names it."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if "native" in os.environ.get("MIMIR_FAST_REQUIRE", ""):
                raise
            print(f"mimir_fast: C++ ops not built ({error}); the PyTorch definitions will be used")

    def build_extensions(self) -> None:
        """Keep the flags this compiler knows; without OpenMP the kernels run on one thread."""
        flags = [flag for flag in COMPILE_FLAGS if has_flag(self.compiler, flag)]
        for extension in self.extensions:
            extension.extra_compile_args += flags
            extension.extra_link_args += [flag for flag in flags if flag == "-fopenmp"]
            jobs = int(os.environ.get("MIMIR_FAST_BUILD_JOBS", JOBS))
            announce(
                f"mimir_fast: compiling {len(extension.sources)} C++ files, {jobs} at a time: about "
                f"{round(COMPILE_SECONDS / min(jobs, len(extension.sources)), -1):.0f} s. Without a C++ compiler "
                "plain PyTorch runs."
            )
        super().build_extensions()


def native_extension() -> list[Pybind11Extension]:
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    headers = sorted(str(path) for path in Path("csrc").glob("*.h"))
    return [Pybind11Extension("mimir_fast._C", sources, cxx_std=17, depends=headers)] if sources else []


packages = find_packages(include=["mimir_fast", "mimir_fast.*"])
setup(
    packages=[*packages, "mimir_kernels"],
    package_dir={"mimir_kernels": "kernels/mimir_kernels"},
    package_data={"mimir_fast": ["py.typed", "evaluation/*.json"]},
    ext_modules=native_extension(),
    cmdclass={"build_ext": OptionalBuildExt},
)
