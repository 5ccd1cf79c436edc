// Scores of the bf16 attention: where they need not lie in memory first, and in the backward pass from scores s and
// products dp to p and ds = p (dp − along).
//
// Legend as in bf16_attention.cpp: scores and products stand as (keys, queries).
#pragma once

#include "bf16_matrix.h"

#ifdef MIMIR_BF16_MATRIX
// GCC's own intrinsics start from registers they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace mimir {

// 16 queries of 8 numbers, or their gradients, in registers.
struct Queries {
    __m512bh pairs[4];

    MIMIR_BF16_INLINE explicit Queries(MatrixB queries) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) pairs[k] = (__m512bh)_mm512_loadu_si512(queries.data + k * queries.stride);
    }
    // With key j. No key waits for another, so that products of many are under way at once.
    MIMIR_BF16_INLINE __m512 product(MatrixA keys, std::int64_t j) const {
        const auto* key = reinterpret_cast<const std::int32_t*>(keys.data + j * keys.stride);
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sum = _mm512_dpbf16_ps(sum, in_all_lanes(key[k]), pairs[k]);
        return sum;
    }
};

// Scores of 16 queries with S keys of 8 numbers, and the largest of each query.
MIMIR_BF16 __attribute__((noinline)) inline __m512 scores_and_largest(MatrixA keys, MatrixB queries, std::int64_t S,
                                                                      MatrixC scores) {
    const Queries q(queries);
    __m512 largest = q.product(keys, 0);
    _mm512_storeu_ps(scores.data, largest);
    for (std::int64_t j = 1; j < S; ++j) {
        const __m512 score = q.product(keys, j);
        _mm512_storeu_ps(scores.data + j * scores.stride, score);
        largest = _mm512_max_ps(largest, score);
    }
    return largest;
}

// Heads of 8 numbers without tiles: the gradients of two keys share a vector, number by number, so that its lanes are
// full. Then p and ds have a row for two keys, the pairs of both side by side, and an operand's numbers stand twice.
MIMIR_BF16_INLINE __m512i two_keys_of(__m512i rows) {
    return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0), rows);
}

// (rows, depth) bfloat16 → (rows/2, 16) such an operand of their first 8 numbers.
MIMIR_BF16_INLINE void pair_rows_twice(const std::uint16_t* from, std::int64_t depth, std::int64_t rows, std::uint32_t* to) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (std::int64_t r = 0; r < rows; r += 2) {
        const __m256i even = _mm256_loadu_si256((const __m256i*)(from + r * depth));
        const __m256i odd = _mm256_loadu_si256((const __m256i*)(from + (r + 1) * depth));
        _mm512_storeu_si512(to + r / 2 * 16, _mm512_permutexvar_epi32(twice, interleave(even, odd)));
    }
}

// p and ds as operands: rows of queries, and of ds also pairs of keys.
struct Operands {
    std::uint16_t *p, *ds;  // (keys, C), or (keys/2, 2 C)
    std::uint32_t* ds_pairs;  // (keys/2, C)
    std::int64_t C;
    bool two_keys;

    // Queries c … c + 15 of keys j and j + 1.
    MIMIR_BF16_INLINE void put(std::uint16_t* to, std::int64_t j, std::int64_t c, __m512i rows) const {
        if (two_keys) {
            _mm512_storeu_si512(to + j * C + 2 * c, two_keys_of(rows));
        } else {
            store_rows(to + j * C + c, C, rows);
        }
    }
};

// Of two keys.
struct Two {
    __m512 first, second;
};

// Scores and products of keys j and j + 1 with queries c … c + 15 → their p and ds. Keys from `inside` on are padding.
class Differentiate {
  public:
    MIMIR_BF16_INLINE Differentiate(float scale, const float* lse, const float* along)
        : to_exponent_(_mm512_set1_ps(scale * 1.44269504f)),
          shift_(_mm512_mul_ps(_mm512_loadu_ps(lse), _mm512_set1_ps(1.44269504f))), mean_(_mm512_loadu_ps(along)) {}

    MIMIR_BF16_INLINE void operator()(Two scores, Two products, std::int64_t j, std::int64_t c, std::int64_t inside,
                                      const Operands& to) const {
        const Two p = {j < inside ? probability(scores.first) : _mm512_setzero_ps(),
                       j + 1 < inside ? probability(scores.second) : _mm512_setzero_ps()};
        const __m512i ds_rows = rows_of(_mm512_mul_ps(p.first, _mm512_sub_ps(products.first, mean_)),
                                        _mm512_mul_ps(p.second, _mm512_sub_ps(products.second, mean_)));
        to.put(to.p, j, c, rows_of(p.first, p.second));
        to.put(to.ds, j, c, ds_rows);
        _mm512_storeu_si512(to.ds_pairs + j / 2 * to.C + c, pairs_of(ds_rows));
    }

  private:
    MIMIR_BF16_INLINE __m512 probability(__m512 score) const {
        return exp2_of_nonpositive(_mm512_fmsub_ps(score, to_exponent_, shift_));
    }
    __m512 to_exponent_, shift_, mean_;
};

// Blocks of (keys, 32) in memory.
MIMIR_BF16_INLINE void differentiate(const float* scores, const float* products, std::int64_t keys, std::int64_t inside,
                                     std::int64_t queries, float scale, const float* lse, const float* along,
                                     Operands to) {
    for (std::int64_t c = 0; c < queries; c += 16) {
        const Differentiate differentiate(scale, lse + c, along + c);
        for (std::int64_t j = 0; j < keys; j += 2) {
            const std::int64_t at = 32 * j + c;
            differentiate({_mm512_loadu_ps(scores + at), _mm512_loadu_ps(scores + at + 32)},
                          {_mm512_loadu_ps(products + at), _mm512_loadu_ps(products + at + 32)}, j, c, inside, to);
        }
    }
}

// Heads of 8 numbers without tiles: no score lies in memory.
MIMIR_BF16 __attribute__((noinline)) inline void multiply_and_differentiate(
    MatrixA keys, MatrixA values, MatrixB queries, MatrixB grads, std::int64_t count, std::int64_t inside, float scale,
    const float* lse, const float* along, const Operands& to) {
    const Queries q(queries), g(grads);
    const Differentiate differentiate(scale, lse, along);
    for (std::int64_t j = 0; j < count; j += 2) {
        differentiate({q.product(keys, j), q.product(keys, j + 1)}, {g.product(values, j), g.product(values, j + 1)}, j, 0,
                      inside, to);
    }
}

}  // namespace mimir
#endif
