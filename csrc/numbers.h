// Numbers as they lie in memory, float32 or bfloat16, and as they are computed with, float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "multiversion.h"

namespace mimir {

using Bf16 = std::uint16_t;

MIMIR_INLINE float load(const float* from) { return *from; }
MIMIR_INLINE void store(float value, float* to) { *to = value; }

MIMIR_INLINE float load(const Bf16* from) {
    const std::uint32_t bits = static_cast<std::uint32_t>(*from) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

MIMIR_INLINE void store(float value, Bf16* to) {  // to the nearest, ties to even, a NaN stays one: as PyTorch rounds
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    *to = static_cast<Bf16>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

}  // namespace mimir
