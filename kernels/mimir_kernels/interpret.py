"""Is Triton's interpreter on? It runs a kernel as NumPy on the CPU, to test it where there is no GPU.

The interpreter is chosen by TRITON_INTERPRET=1 at the moment a kernel is decorated, so this is a constant of the
process. Two things differ from a GPU and a kernel must know it: interpreted, conversion to bf16 truncates and `tl.dot`
of bf16 operands is wrong. So under a constexpr kernels keep such operands in fp32, rounded to bf16 by hand
(`gram.round_bf16`); products of bf16 numbers are exact in fp32, so the result is what tensor cores give.
"""

import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
