// A point drawn uniformly from an L-infinity ball around x, cut to the data range: the noise of philox.h, added.
#pragma once

#include <algorithm>

#include "multiversion.h"
#include "philox.h"

namespace mimir {

struct Ball {
    float eps, low, high;
};

// Numbers [begin, end) of a sample's row; `begin` is a multiple of 4, x and out point to the row's number `begin`.
MIMIR_INLINE void uniform_start(const PhiloxStream& where, std::int64_t begin, std::int64_t end, const float* x,
                                const Ball& ball, float* out) {
    std::uint32_t words[PHILOX_WORDS];
    for (std::int64_t first = begin; first < end; first += PHILOX_WORDS) {
        philox_words(where, static_cast<std::uint32_t>(first / 4), words);
        const std::int64_t count = std::min<std::int64_t>(PHILOX_WORDS, end - first), offset = first - begin;
        for (std::int64_t i = 0; i < count; ++i) {
            const float noise = (2.0f * uniform_from_bits(words[i]) - 1.0f) * ball.eps;
            const float clean = x[offset + i], lower = clean - ball.eps, upper = clean + ball.eps;
            float y = clean + noise;
            y = y < ball.low ? ball.low : y;  // a NaN stays
            y = y > ball.high ? ball.high : y;
            // Of use only where `clean` is outside of the range, which may then move it by eps at most.
            y = y < lower ? lower : y;
            out[offset + i] = y > upper ? upper : y;
        }
    }
}

}  // namespace mimir
