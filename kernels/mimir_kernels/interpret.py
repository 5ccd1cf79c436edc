"""Is Triton's interpreter on? It runs a kernel as NumPy on the CPU, to test it where there is no GPU.

The interpreter is chosen by TRITON_INTERPRET=1 at the moment a kernel is decorated, so this is a constant of the
process. One thing differs from a GPU and a kernel must know it: `tl.dot` of bf16 operands is wrong when interpreted, so
kernels upcast them to fp32 under a constexpr (bf16 products are exact in fp32: the result is what tensor cores give).
"""

import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
