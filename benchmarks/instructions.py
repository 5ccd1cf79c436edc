"""Are the elementwise kernels bound by memory? Read off their machine code: `python -m benchmarks.instructions`.

Each kernel is compiled for an H200 (sm_90) on any machine with Triton, and its instructions are counted by the pipe
that executes them. Straight-line code: every instruction runs once a warp, predicated ones too.

    floor      bytes a number moves / memory bandwidth
    pipe       instructions a number × cycles that one keeps the pipe / (schedulers × clock)
    ratio      the busiest pipe over the floor; memory and pipes overlap, so below 1 the kernel is bound by memory

A prediction: latencies, caches and the clock under load are left out. Exit status 1 where a ratio is above --most.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mimir_kernels import aot

CAPABILITY = 90
BANDWIDTH, CLOCK, SCHEDULERS = 4.8e12, 1.98e9, 132 * 4
# Cycles for which an instruction of a warp keeps its pipe: 32 over the lanes of a scheduler. Lanes: throughput of
# arithmetic instructions in CUDA's programming guide, and pipes as Nsight Compute names them. Conversions of bytes to
# float are taken to be as slow as those of Ampere.
PIPES = {
    "issue": (1, r"."),
    "alu": (2, r"(IADD3|LOP3|SHF|PRMT|ISETP|SEL|FSEL|FSETP|FMNMX|VIADD|VIMNMX|LEA|IABS|MOV|PLOP3|F2FP|I2FP|SGXT)\b"),
    "imad": (2, r"IMAD\b"),
    "fma": (1, r"(IMAD|FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2|CS2R)\b"),
    "xu": (8, r"(I2F|F2I|F2F|FRND|MUFU|POPC)\b"),
    "lsu": (4, r"(LDG|STG|LDS|STS|SHFL|LDC|BAR|RED|ATOM\w*)\b"),
}
# Kernel → pointers through which each number is moved once. What a cache serves is left out.
MOVED = {
    "_patchify_gather_kernel": ("images_ptr", "out_ptr"),
    "_unpatchify_visible_kernel": ("patches_ptr", "images_ptr"),
    "_noisy_patches_kernel": ("images_ptr", "clean_ptr", "noisy_ptr"),
    "_masked_loss_kernel": ("prediction_ptr", "images_ptr", "gradient_ptr"),
    "_linf_step_kernel": ("x_adv_ptr", "grad_ptr", "x_ptr", "out_ptr"),
    "_random_uniform_kernel": ("out_ptr",),
    "_random_start_linf_kernel": ("x_ptr", "out_ptr"),
    "_gather_patches_kernel": ("x_ptr", "out_ptr"),
    "_scatter_patches_kernel": ("out_ptr",),
    "_add_positions_kernel": ("tokens_ptr", "out_ptr"),
}
BYTES = {"*u8": 1, "*bf16": 2, "*fp16": 2, "*fp32": 4}


@dataclass(frozen=True)
class Balance:
    """Of one kernel. Instructions a number, and each pipe's time over the memory's."""

    bytes: int
    instructions: float
    pipes: dict[str, float]

    @property
    def ratio(self) -> float:
        """Predicted time over the memory floor, if that is above 1."""
        return max(self.pipes.values())


def numbers_of(case: aot.AotCase) -> int:
    """How many numbers one program computes; what a tile is rounded up by is no number."""
    size = case.constexprs
    if "BLOCK_P" in size:
        return int(size["BLOCK_R"] * size["PATCH"] ** 2 * size["C"])
    return int(size["BLOCK"] if "BLOCK" in size else size["BLOCK_R"] * size["BLOCK_D"])


def balance(case: aot.AotCase, opcodes: Counter[str]) -> Balance:
    """Weigh a kernel's instructions against the bytes that it moves."""
    moved = sum(BYTES[case.signature[name]] for name in MOVED[case.kernel.__name__])
    work = Counter({opcode: count for opcode, count in opcodes.items() if opcode != "NOP"})
    each = case.num_warps * 32 / numbers_of(case)  # instructions of a thread → of a number

    def time(cycles: int, pattern: str) -> float:
        warps = sum(count for opcode, count in work.items() if re.match(pattern, opcode)) * each / 32
        return warps * cycles / (SCHEDULERS * CLOCK)

    floor = moved / BANDWIDTH
    return Balance(moved, work.total() * each, {name: time(*pipe) / floor for name, pipe in PIPES.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a kernel is above `--most`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PREFIX", help="kernels whose name begins so, as `patches.`")
    parser.add_argument("--most", type=float, default=1.3, help="times its memory floor that a kernel may take")
    options = parser.parse_args(arguments)
    print(f"{'sm_90, H200':<34}{'bytes':>6}{'instr.':>8}" + "".join(f"{name:>7}" for name in PIPES) + f"{'ratio':>7}")
    slow = []
    for case, capability in aot.discover_cases().values():
        if capability != CAPABILITY or case.kernel.__name__ not in MOVED or not case.name.startswith(options.only):
            continue
        found = balance(case, aot.listing_of(aot.compile_kernel(case, capability).asm["cubin"])[1])
        pipes = "".join(f"{value:>7.2f}" for value in found.pipes.values())
        print(f"{case.name:<34}{found.bytes:>6}{found.instructions:>8.1f}{pipes}{found.ratio:>7.2f}", flush=True)
        slow += [case.name] * (found.ratio > options.most)
    for name in slow:
        print(f"FAILED {name}: more than {options.most} times its memory floor", file=sys.stderr)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
