// Exponentials of t <= 0 that a compiler turns into vector instructions, good to 2 ulp.
//
// With n = round(t / ln 2) and f = t - n ln 2, exp(t) = 2^n exp(f), and expm1(f) is a short Taylor series.
#pragma once

#include <cstdint>
#include <cstring>

#include "multiversion.h"

namespace mimir {

template <typename To, typename From>
MIMIR_INLINE To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

// exp(t) = scale * (1 + expm1).
struct Exponential {
    float scale, expm1;
};

MIMIR_INLINE Exponential exponential_of_nonpositive(float t) {
    t = t < -87.0f ? -87.0f : t;  // exp underflows; written so that a NaN stays
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const float shifted = t * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float f = (t - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
    const float scale = bits_of<float>((bits_of<std::uint32_t>(shifted) + 127u) << 23);
    // Taylor to order 7: for |f| <= ln 2 / 2 the rest is 1.6e-8 relative.
    float p = 1.0f / 5040 * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    return {scale, p * f * f + f};
}

// exp(t) - 1: 2^n expm1(f) + (2^n - 1), without cancellation near 0.
MIMIR_INLINE float expm1_of_nonpositive(float t) {
    const Exponential e = exponential_of_nonpositive(t);
    return e.scale * e.expm1 + (e.scale - 1.0f);
}

MIMIR_INLINE float exp_of_nonpositive(float t) {
    const Exponential e = exponential_of_nonpositive(t);
    return e.scale * e.expm1 + e.scale;
}

// 2^f for |f| <= 1/2, by powers of f: the minimax polynomial, of relative error 2e-9.
constexpr float kExp2[] = {1.0f,           6.93147182e-1f, 2.40226462e-1f, 5.55032864e-2f,
                           9.61848907e-3f, 1.33999344e-3f, 1.5345822e-4f};

}  // namespace mimir
