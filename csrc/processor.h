// The vector and matrix instructions that our kernels use: the widest of this processor, or fewer where one asks for it.
#pragma once

namespace mimir {

// Each has what those before it have. avx2 is x86-64-v3, avx512 is x86-64-v4.
enum class Unit { none, avx2, avx512, avx512_bf16, amx };

// In use. Functions with MIMIR_MULTIVERSION do not ask: the loader chooses among their versions.
Unit unit();

}  // namespace mimir
