"""The two packages and the optional C++ extension; everything else is in pyproject.toml.

`mimir_fast` is the package; `mimir_kernels` (Triton) lies in kernels/ because the import name `kernels` is taken by
another project. csrc/ becomes `mimir_fast._C` with pybind11 and OpenMP; torch is not needed to build it. Without a
compiler the install goes on and the ops run their PyTorch definitions (`python -m mimir_fast.info` says so).
"""

import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup


class OptionalBuildExt(build_ext):
    """An extension that fails to compile is reported, not fatal, unless MIMIR_FAST_REQUIRE names it."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if "native" in os.environ.get("MIMIR_FAST_REQUIRE", ""):
                raise
            print(f"mimir_fast: C++ ops not built ({error}); the PyTorch definitions will be used")


def native_extension() -> list[Pybind11Extension]:
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    # AVX2 is compiled per function with a run-time check, so the wheel runs on any x86-64.
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"]
    extension = Pybind11Extension(
        "mimir_fast._C",
        sources,
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    )
    return [extension] if sources else []


packages = find_packages(include=["mimir_fast", "mimir_fast.*"])
setup(
    packages=[*packages, "mimir_kernels"],
    package_dir={"mimir_kernels": "kernels/mimir_kernels"},
    package_data={"mimir_fast": ["py.typed"]},
    ext_modules=native_extension(),
    cmdclass={"build_ext": OptionalBuildExt},
)
