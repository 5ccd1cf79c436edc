// Philox4x32-10, bit for bit mimir_fast/philox.py: counter (element / 4, sample, step, stream), key = seed.
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. `LANES` neighbouring counters are done at a
// time, so that a compiler turns each statement of the rounds into vector instructions.
#pragma once

#include <cstdint>

#include "multiversion.h"

namespace mimir {

constexpr int PHILOX_LANES = 16;
constexpr int PHILOX_WORDS = 4 * PHILOX_LANES;

struct PhiloxStream {
    std::uint64_t seed;
    std::uint32_t sample, step, stream;
};

// words[4 * lane + w] = word w of counter first_block + lane: the bits of elements 4 * first_block and following.
MIMIR_INLINE void philox_words(const PhiloxStream& where, std::uint32_t first_block, std::uint32_t* words) {
    std::uint32_t c0[PHILOX_LANES], c1[PHILOX_LANES], c2[PHILOX_LANES], c3[PHILOX_LANES];
    for (int i = 0; i < PHILOX_LANES; ++i) {
        c0[i] = first_block + static_cast<std::uint32_t>(i);
        c1[i] = where.sample;
        c2[i] = where.step;
        c3[i] = where.stream;
    }
    auto k0 = static_cast<std::uint32_t>(where.seed), k1 = static_cast<std::uint32_t>(where.seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd  // otherwise GCC unrolls the lanes first and then sees no vector: 4 times slower
        for (int i = 0; i < PHILOX_LANES; ++i) {
            const std::uint64_t p0 = static_cast<std::uint64_t>(c0[i]) * 0xD2511F53u;
            const std::uint64_t p1 = static_cast<std::uint64_t>(c2[i]) * 0xCD9E8D57u;
            c0[i] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = static_cast<std::uint32_t>(p1);
            c3[i] = static_cast<std::uint32_t>(p0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < PHILOX_LANES; ++i) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

// A multiple of 2^-24 in [0, 1), as mimir_fast.philox.uniform.
MIMIR_INLINE float uniform_from_bits(std::uint32_t bits) {
    return static_cast<float>(static_cast<std::int32_t>(bits >> 8)) * 0x1p-24f;
}

}  // namespace mimir
