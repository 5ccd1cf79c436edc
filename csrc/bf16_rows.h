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

// Φ(x), the normal distribution, and exp(−x²/2): Abramowitz and Stegun 7.1.26, to 1.5e-7.
struct Normal {
    __m512 probability, bell;
};
MIMIR_BF16_INLINE Normal normal(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
    const __m512 bell = exp2_of_nonpositive(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.72134752f)));
    const __m512 d = _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.70710678f), one);
    __m512 t = _mm512_rcp14_ps(d);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, _mm512_set1_ps(2.0f)));
    __m512 p = _mm512_set1_ps(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * -1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * -0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 0.254829592f));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), bell);
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ);  // NaN too: 1 − NaN
    return {_mm512_mask_sub_ps(tail, positive, one, tail), bell};
}

MIMIR_BF16_INLINE __m512 gelu(__m512 x) { return _mm512_mul_ps(x, normal(x).probability); }

// The value, and the gradient that goes through it.
struct GeluGradient {
    __m512 value, grad;
};
MIMIR_BF16_INLINE GeluGradient gelu_backward(__m512 x, __m512 grad) {
    const Normal phi = normal(x);
    const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.39894228f)), phi.bell, phi.probability);
    return {_mm512_mul_ps(x, phi.probability), _mm512_mul_ps(grad, slope)};
}

}  // namespace mimir
#endif
