"""Compile every kernel with each of its integers set to 1, and print what fails.

A launcher makes a compile-time constant of an argument that is 1: one feature, one tile, one split. The code is then
another, which may not compile, and the interpreter never sees it. A process of its own, as compiling needs a Triton
that does not interpret: `python tests/kernels/compile_with_ones.py [PREFIX]`.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

from mimir_kernels import aot

CAPABILITY = 90


def with_ones(case: aot.AotCase) -> Iterator[tuple[str, aot.AotCase]]:
    """Each integer alone, then all of them."""
    integers = [name for name, kind in case.signature.items() if kind in ("i32", "i64")]
    for ones in [*([name] for name in integers), integers]:
        signature = {name: kind for name, kind in case.signature.items() if name not in ones}
        aligned = [name for name in case.divisible_by_16 if name not in ones]
        constants = {**case.constexprs, **dict.fromkeys(ones, 1)}
        yield ", ".join(ones), replace(case, signature=signature, constexprs=constants, divisible_by_16=aligned)


def main(prefix: str = "") -> int:
    """1 if anything failed. One case a kernel and set of flags: the dtypes do not matter here."""
    seen, failed = set(), 0
    for key, (case, capability) in aot.discover_cases().items():
        flags = tuple(item for item in case.constexprs.items() if not isinstance(item[1], int) or item[1] in (0, 1))
        if capability != CAPABILITY or not key.startswith(prefix) or (case.kernel.__name__, flags) in seen:
            continue
        seen.add((case.kernel.__name__, flags))
        for ones, variant in with_ones(case):
            try:
                aot.compile_case(variant, CAPABILITY)
            except Exception as error:  # the compiler's own kinds, and Python's
                failed += 1
                print(f"{key} with {ones} = 1: {type(error).__name__}: {error}")
    print(f"{len(seen)} kernels, {failed} failures")
    return int(failed > 0 or not seen)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
