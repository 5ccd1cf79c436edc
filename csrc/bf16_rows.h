// What happens to rows of numbers between two products: layer normalisation and GELU, with their derivatives.
//
// In float32 registers; rows come from memory in float32 or bfloat16 and go into products as bfloat16.
#pragma once

#include <cmath>

#include "bf16_product.h"

#ifdef MIMIR_BF16_MATRIX
namespace mimir {

// gamma == nullptr: no normalisation, the rows go in as they are.
struct Norm {
    const float *gamma, *beta;
    float eps;
};

// Numbers of bfloat16 in rows of length `stride`.
MIMIR_BF16_INLINE void put(std::uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, to_bf16(x)); }

// 32 numbers in two registers, as they come from a panel: one line of memory in bfloat16.
struct Line {
    __m512 low, high;
};
MIMIR_BF16_INLINE Line line(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
MIMIR_BF16_INLINE Line line(__m512i numbers) {
    return {from_bf16(_mm512_castsi512_si256(numbers)), from_bf16(_mm512_extracti64x4_epi64(numbers, 1))};
}
MIMIR_BF16_INLINE __m512i to_bf16(const Line& x) { return (__m512i)_mm512_cvtne2ps_pbh(x.high, x.low); }

// Mean and 1/deviation of a row.
MIMIR_BF16_INLINE void moments(const Matrix& x, std::int64_t row, float eps, float* mean, float* scale) {
    const std::int64_t K = x.columns;
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (std::int64_t k = 0; k < K; k += 16) sum = _mm512_add_ps(sum, x.load(row, k, lanes(K - k)));
    *mean = _mm512_reduce_add_ps(sum) / static_cast<float>(K);
    for (std::int64_t k = 0; k < K; k += 16) {
        const __mmask16 inside = lanes(K - k);
        const __m512 d = _mm512_maskz_sub_ps(inside, x.load(row, k, inside), _mm512_set1_ps(*mean));
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    *scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(K) + eps);
}

// Rows [row, row + count) of x, normalised where there is a norm → (rows, stride) bfloat16 with zeros around.
// statistics: (2,) mean and 1/deviation for each row; computed unless `known`.
MIMIR_BF16_INLINE void stage(const Matrix& x, std::int64_t row, std::int64_t count, std::int64_t rows, const Norm& norm,
                             float* statistics, bool known, std::uint16_t* to, std::int64_t stride) {
    const std::int64_t K = x.columns;
    for (std::int64_t r = 0; r < rows; ++r) {
        std::uint16_t* out = to + r * stride;
        if (r >= count) {
            for (std::int64_t k = 0; k < stride; k += 16) put(out + k, _mm512_setzero_ps());
            continue;
        }
        if (!x.wide && norm.gamma == nullptr) {  // as they are
            const auto* from = reinterpret_cast<const std::uint16_t*>(x.data) + (row + r) * K;
            for (std::int64_t k = 0; k < stride; k += 32) {
                _mm512_storeu_si512(out + k, _mm512_maskz_loadu_epi16(wide_lanes(K - k), from + k));
            }
            continue;
        }
        float* s = statistics + 2 * (row + r);
        if (norm.gamma != nullptr && !known) moments(x, row + r, norm.eps, s, s + 1);
        for (std::int64_t k = 0; k < stride; k += 16) {
            const __mmask16 inside = lanes(K - k);
            __m512 v = x.load(row + r, k, inside);
            if (norm.gamma != nullptr) {
                v = _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(s[0])), _mm512_set1_ps(s[1]));
                v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(inside, norm.gamma + k),
                                    _mm512_maskz_loadu_ps(inside, norm.beta + k));
            }
            put(out + k, _mm512_maskz_mov_ps(inside, v));
        }
    }
}

// Sums over blocks of 32 rows of what gamma and beta get, (⌈M/32⌉, 2, K): so that the threads' shares do not matter.
struct NormGradient {
    float* blocks;  // nullptr: not wanted
    std::int64_t K;

    MIMIR_INLINE float* of(std::int64_t row) const { return blocks + row / 32 * 2 * K; }
};

// Gradient of a normalised row → of the row itself, plus `along` (a residual's gradient) where there is one.
MIMIR_BF16_INLINE void norm_backward(const Matrix& x, std::int64_t row, const Norm& norm, const float* statistics,
                                     const float* grad, const Matrix* along, const Matrix& dx, const NormGradient& sums) {
    const std::int64_t K = x.columns;
    const __m512 mean = _mm512_set1_ps(statistics[2 * row]), scale = _mm512_set1_ps(statistics[2 * row + 1]);
    __m512 sum = _mm512_setzero_ps(), projection = _mm512_setzero_ps();
    for (std::int64_t k = 0; k < K; k += 16) {
        const __mmask16 inside = lanes(K - k);
        const __m512 g = _mm512_maskz_loadu_ps(inside, grad + k);
        const __m512 d = _mm512_mul_ps(g, _mm512_maskz_loadu_ps(inside, norm.gamma + k));
        const __m512 u = _mm512_mul_ps(_mm512_sub_ps(x.load(row, k, inside), mean), scale);
        sum = _mm512_add_ps(sum, d);
        projection = _mm512_fmadd_ps(d, u, projection);
        if (sums.blocks != nullptr) {
            float* block = sums.of(row);
            const bool first = row % 32 == 0;
            const __m512 gamma = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(inside, block + k);
            const __m512 beta = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(inside, block + K + k);
            _mm512_mask_storeu_ps(block + k, inside, _mm512_fmadd_ps(g, u, gamma));
            _mm512_mask_storeu_ps(block + K + k, inside, _mm512_add_ps(g, beta));
        }
    }
    const float share = 1.0f / static_cast<float>(K);
    const __m512 c1 = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * share);
    const __m512 c2 = _mm512_set1_ps(_mm512_reduce_add_ps(projection) * share);
    for (std::int64_t k = 0; k < K; k += 16) {
        const __mmask16 inside = lanes(K - k);
        const __m512 d = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, grad + k), _mm512_maskz_loadu_ps(inside, norm.gamma + k));
        const __m512 u = _mm512_mul_ps(_mm512_sub_ps(x.load(row, k, inside), mean), scale);
        __m512 v = _mm512_mul_ps(scale, _mm512_fnmadd_ps(u, c2, _mm512_sub_ps(d, c1)));
        if (along != nullptr) v = _mm512_add_ps(v, along->load(row, k, inside));
        dx.store(row, k, v, inside);
    }
}

// The blocks' sums in their order → gradients of gamma and beta.
MIMIR_BF16 inline void add_blocks(const NormGradient& sums, std::int64_t M, float* gamma, float* beta) {
    const std::int64_t K = sums.K;
    for (std::int64_t k = 0; k < K; k += 16) {
        const __mmask16 inside = lanes(K - k);
        __m512 g = _mm512_setzero_ps(), b = _mm512_setzero_ps();
        for (std::int64_t m = 0; m < M; m += 32) {
            g = _mm512_add_ps(g, _mm512_maskz_loadu_ps(inside, sums.of(m) + k));
            b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(inside, sums.of(m) + K + k));
        }
        _mm512_mask_storeu_ps(gamma + k, inside, g);
        _mm512_mask_storeu_ps(beta + k, inside, b);
    }
}

// A function of a in [0, 7.875) as cubics around the multiples of 1/4, each through the Chebyshev nodes of its piece. The
// last piece is zero: GELU of −7.6 is 1e-13.
struct Cubics {
    alignas(64) float coefficients[4][32];

    template <typename Function>
    explicit Cubics(const Function& of) {
        for (int piece = 0; piece < 32; ++piece) {
            double node[4], difference[4];
            for (int i = 0; i < 4; ++i) {
                node[i] = 0.5 * std::cos((2 * i + 1) * 0.39269908169872414);  // π/8, in units of a piece
                difference[i] = piece == 31 ? 0.0 : of((piece + node[i]) / 4);
            }
            for (int order = 1; order < 4; ++order) {
                for (int i = 3; i >= order; --i) {
                    difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
                }
            }
            double power[4] = {difference[3], 0, 0, 0};  // Newton's form, multiplied out from the inside
            for (int i = 2; i >= 0; --i) {
                for (int n = 3; n > 0; --n) power[n] = power[n - 1] - node[i] * power[n];
                power[0] = difference[i] - node[i] * power[0];
            }
            for (int n = 0; n < 4; ++n) coefficients[n][piece] = static_cast<float>(power[n]);
        }
    }
};

// Where |x| lies among the pieces, and which side.
struct Place {
    __m512i piece;
    __m512 within;  // -1/2 … 1/2
    __mmask16 positive;
};
MIMIR_BF16_INLINE Place place(__m512 x) {
    constexpr int kSmallestSize = 0b1010;  // of the two sizes the smaller, without sign
    const __m512 a = _mm512_range_ps(x, _mm512_set1_ps(7.75f), kSmallestSize);
    const __m512 round = _mm512_set1_ps(12582912.0f);  // 1.5·2^23: adding it leaves an integer in the low bits
    const __m512 shifted = _mm512_fmadd_ps(a, _mm512_set1_ps(4.0f), round);
    const __m512 within = _mm512_fmsub_ps(a, _mm512_set1_ps(4.0f), _mm512_sub_ps(shifted, round));
    return {_mm512_castps_si512(shifted), within, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ)};
}

// A function f of the real line with f(x) + f(-x) = 1, from its cubics at −a: relative to f also where that is tiny.
class Sigmoid {
  public:
    MIMIR_BF16_INLINE explicit Sigmoid(const Cubics& cubics) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            low_[n] = _mm512_load_ps(cubics.coefficients[n]);
            high_[n] = _mm512_load_ps(cubics.coefficients[n] + 16);
        }
    }
    MIMIR_BF16_INLINE __m512 operator()(const Place& at) const {
        __m512 f = coefficient(3, at);
        f = _mm512_fmadd_ps(f, at.within, coefficient(2, at));
        f = _mm512_fmadd_ps(f, at.within, coefficient(1, at));
        f = _mm512_fmadd_ps(f, at.within, coefficient(0, at));
        return _mm512_mask_sub_ps(f, at.positive, _mm512_set1_ps(1.0f), f);
    }

  private:
    MIMIR_BF16_INLINE __m512 coefficient(int n, const Place& at) const {
        return _mm512_permutex2var_ps(low_[n], at.piece, high_[n]);
    }
    __m512 low_[4], high_[4];
};

// Φ, the normal distribution: gelu(x) = x Φ(x).
inline const Cubics& normal_cubics() {
    static const Cubics cubics([](double a) { return 0.5 * std::erfc(a * 0.70710678118654752); });
    return cubics;
}

// GELU's derivative Φ(x) + x φ(x).
inline const Cubics& gelu_slope_cubics() {
    static const Cubics cubics([](double a) {
        return 0.5 * std::erfc(a * 0.70710678118654752) - a * 0.3989422804014327 * std::exp(-a * a / 2);
    });
    return cubics;
}

}  // namespace mimir
#endif
