// Products of small bfloat16 matrices, summed in float32, on AMX tiles or on AVX-512's bf16 dot products.
//
// Both units take the same layout: A row by row, B with two rows interleaved, so that one 32-bit lane of B holds the
// two numbers that meet a pair of A. Legend: A (M, K), B as (K/2, N) pairs, C (M, N) float32; M and N multiples of 16,
// K of 32 (without tiles of 2), all aligned to 64 bytes a row.
#pragma once

#include "functions.h"

#ifdef MIMIR_BF16_MATRIX
#include <immintrin.h>

#include <cstdint>

#include "multiversion.h"

// Compiled for these instructions whatever the rest of the file is; `bf16_unit` says whether they may be run.
#define MIMIR_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,prfchw")))
#define MIMIR_BF16_INLINE MIMIR_BF16 MIMIR_INLINE
#define MIMIR_BF16_LAMBDA MIMIR_BF16 __attribute__((always_inline))  // a lambda does not inherit its function's

namespace mimir {

// The first `count` of 16 lanes.
MIMIR_BF16_INLINE __mmask16 lanes(std::int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// The same of 32.
MIMIR_BF16_INLINE __mmask32 wide_lanes(std::int64_t count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : static_cast<__mmask32>((1u << count) - 1);
}

// While one lives on a thread, its tile registers are eight of 16 rows of 64 bytes.
class Tiles {
  public:
    MIMIR_BF16 explicit Tiles(bool amx) : amx_(amx) {
        if (!amx_) return;
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    MIMIR_BF16 ~Tiles() {
        if (amx_) _tile_release();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    bool amx_;
};

struct MatrixA {
    const std::uint16_t* data;
    std::int64_t stride;  // in numbers
};
struct MatrixB {
    const std::uint32_t* data;
    std::int64_t stride;  // in pairs
};
struct MatrixC {
    float* data;
    std::int64_t stride;
};

// Two by two tiles of C (or fewer, at the edges): each loaded tile of A and B is used twice. `beside(k)` is called at
// every step of K: other work for the vector units, which are idle while the tiles multiply.
template <int kRows, int kColumns, typename Beside>
MIMIR_BF16_INLINE void amx_block(MatrixA a, MatrixB b, MatrixC c, std::int64_t K, bool add, const Beside& beside) {
    const std::int64_t stride = c.stride * 4;
    if (add) {
        _tile_loadd(0, c.data, stride);
        if (kColumns > 1) _tile_loadd(1, c.data + 16, stride);
        if (kRows > 1) _tile_loadd(2, c.data + 16 * c.stride, stride);
        if (kRows > 1 && kColumns > 1) _tile_loadd(3, c.data + 16 * c.stride + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (std::int64_t k = 0; k < K; k += 32) {
        _tile_loadd(4, a.data + k, a.stride * 2);
        if (kRows > 1) _tile_loadd(5, a.data + 16 * a.stride + k, a.stride * 2);
        _tile_loadd(6, b.data + k / 2 * b.stride, b.stride * 4);
        if (kColumns > 1) _tile_loadd(7, b.data + k / 2 * b.stride + 16, b.stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
        if (kRows > 1) _tile_dpbf16ps(2, 5, 6);
        if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
        beside(k);
    }
    _tile_stored(0, c.data, stride);
    if (kColumns > 1) _tile_stored(1, c.data + 16, stride);
    if (kRows > 1) _tile_stored(2, c.data + 16 * c.stride, stride);
    if (kRows > 1 && kColumns > 1) _tile_stored(3, c.data + 16 * c.stride + 16, stride);
}

MIMIR_BF16_INLINE __m512bh in_all_lanes(std::int32_t pair) { return (__m512bh)_mm512_set1_epi32(pair); }
MIMIR_BF16_INLINE __m512bh in_all_lanes(std::int64_t two_pairs) { return (__m512bh)_mm512_set1_epi64(two_pairs); }

// kRows × 16·kVectors of C, all in registers: each loaded vector of B is used kRows times, each pair of A kVectors times.
// Two products start a cycle (Zen 5) and each takes six or so, hence twelve sums or more; as many loads do, so that one
// vector a pair, which needs more loads than products, is a tenth slower. A function of its own: inside another one, GCC
// may keep sums in memory.
// Element: what a vector of B meets, a pair of A in all lanes, or in turns the pairs of two rows that lie side by side.
template <int kRows, int kVectors, typename Element = std::int32_t>
MIMIR_BF16 __attribute__((noinline)) void avx512_block(MatrixA a, MatrixB b, MatrixC c, std::int64_t K, bool add) {
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) {
            sums[m][n] = add ? _mm512_loadu_ps(c.data + m * c.stride + 16 * n) : _mm512_setzero_ps();
        }
    }
    for (std::int64_t k = 0; k < K / 2; ++k) {
        __m512bh pairs[kVectors];
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) pairs[n] = (__m512bh)_mm512_loadu_si512(b.data + k * b.stride + 16 * n);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const __m512bh pair = in_all_lanes(reinterpret_cast<const Element*>(a.data + m * a.stride)[k]);
#pragma GCC unroll 2
            for (int n = 0; n < kVectors; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], pair, pairs[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) _mm512_storeu_ps(c.data + m * c.stride + 16 * n, sums[m][n]);
    }
}

struct Nothing {
    MIMIR_BF16_INLINE void operator()(std::int64_t) const {}
};

constexpr std::int64_t kBlockRows = 8;  // of a block that is two vectors wide

// Where N is 16; M is a multiple of 8.
template <typename Element>
MIMIR_BF16_INLINE void avx512_multiply_narrow(std::int64_t M, std::int64_t K, MatrixA a, MatrixB b, MatrixC c, bool add) {
    for (std::int64_t m = 0; m < M; m += 16) {
        const MatrixA a_m = {a.data + m * a.stride, a.stride};
        const MatrixC c_m = {c.data + m * c.stride, c.stride};
        M - m >= 16 ? avx512_block<16, 1, Element>(a_m, b, c_m, K, add) : avx512_block<8, 1, Element>(a_m, b, c_m, K, add);
    }
}

// Rows and columns: multiples of 8 and 16.
MIMIR_BF16_INLINE void avx512_multiply(std::int64_t M, std::int64_t N, std::int64_t K, MatrixA a, MatrixB b, MatrixC c,
                                       bool add) {
    for (std::int64_t n = 0; n < N; n += 32) {
        if (N - n == 16) {
            avx512_multiply_narrow<std::int32_t>(M, K, a, {b.data + n, b.stride}, {c.data + n, c.stride}, add);
            break;
        }
        for (std::int64_t m = 0; m < M; m += kBlockRows) {
            const MatrixA a_m = {a.data + m * a.stride, a.stride};
            const MatrixB b_n = {b.data + n, b.stride};
            const MatrixC c_mn = {c.data + m * c.stride + n, c.stride};
            avx512_block<kBlockRows, 2>(a_m, b_n, c_mn, K, add);
        }
    }
}

// C = A·B, or C += A·B.
MIMIR_BF16_INLINE void multiply(bool amx, std::int64_t M, std::int64_t N, std::int64_t K, MatrixA a, MatrixB b, MatrixC c,
                                bool add) {
    if (!amx) return avx512_multiply(M, N, K, a, b, c, add);
    for (std::int64_t m = 0; m < M; m += 32) {
        for (std::int64_t n = 0; n < N; n += 32) {
            const MatrixA a_m = {a.data + m * a.stride, a.stride};
            const MatrixB b_n = {b.data + n, b.stride};
            const MatrixC c_mn = {c.data + m * c.stride + n, c.stride};
            if (m + 16 < M) {
                n + 16 < N ? amx_block<2, 2>(a_m, b_n, c_mn, K, add, Nothing())
                           : amx_block<2, 1>(a_m, b_n, c_mn, K, add, Nothing());
            } else {
                n + 16 < N ? amx_block<1, 2>(a_m, b_n, c_mn, K, add, Nothing())
                           : amx_block<1, 1>(a_m, b_n, c_mn, K, add, Nothing());
            }
        }
    }
}

// Two rows of 16 bfloat16 → 16 pairs, the first row in the low halves.
MIMIR_BF16_INLINE __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Two rows of 16 float32 in bfloat16, one in each half.
MIMIR_BF16_INLINE __m512i rows_of(__m512 even, __m512 odd) { return (__m512i)_mm512_cvtne2ps_pbh(odd, even); }

MIMIR_BF16_INLINE void store_rows(std::uint16_t* to, std::int64_t stride, __m512i rows) {
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(rows));
    _mm256_storeu_si256((__m256i*)(to + stride), _mm512_extracti64x4_epi64(rows, 1));
}

// Such rows → 16 pairs, the first row in the low halves.
MIMIR_BF16_INLINE __m512i pairs_of(__m512i rows) {
    const __m512i column = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i odd = _mm512_slli_epi32(_mm512_add_epi32(column, _mm512_set1_epi32(16)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(column, odd), rows);
}

MIMIR_BF16_INLINE __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 16 bfloat16 → float32.
MIMIR_BF16_INLINE __m512 from_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// (rows, columns) of bfloat16 → (rows/2, columns) pairs of one column's neighbours.
MIMIR_BF16_INLINE void pair_rows(const std::uint16_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                                 std::uint32_t* to) {
    for (std::int64_t r = 0; r < rows; r += 2) {
        for (std::int64_t c = 0; c < columns; c += 16) {
            const __m256i even = _mm256_loadu_si256((const __m256i*)(from + r * stride + c));
            const __m256i odd = _mm256_loadu_si256((const __m256i*)(from + (r + 1) * stride + c));
            _mm512_storeu_si512(to + r / 2 * columns + c, interleave(even, odd));
        }
    }
}

// 16×16 numbers of 32 bits.
MIMIR_BF16_INLINE void transpose_block(const std::uint32_t* from, std::int64_t from_stride, std::uint32_t* to,
                                       std::int64_t to_stride) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4g + c] holds, in lane l, columns 4l + c of rows 4g … 4g + 3: now lanes and groups change places.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(to + (8 + c) * to_stride, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_storeu_si512(to + (4 + c) * to_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(to + (12 + c) * to_stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// 16×4 numbers of 32 bits.
MIMIR_BF16_INLINE void transpose_narrow_block(const std::uint32_t* from, std::int64_t from_stride, std::uint32_t* to,
                                              std::int64_t to_stride) {
    const auto row = [&](std::int64_t i) MIMIR_BF16_LAMBDA { return _mm_loadu_si128((const __m128i*)(from + i * from_stride)); };
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // rows i, 4 + i, 8 + i, 12 + i
        r[i] = _mm512_castsi128_si512(row(i));
        r[i] = _mm512_inserti32x4(r[i], row(4 + i), 1);
        r[i] = _mm512_inserti32x4(r[i], row(8 + i), 2);
        r[i] = _mm512_inserti32x4(r[i], row(12 + i), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(to + to_stride, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(to + 2 * to_stride, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(to + 3 * to_stride, _mm512_unpackhi_epi64(high01, high23));
}

// (rows, columns) → (columns, rows) of 32-bit numbers, both multiples of 16.
MIMIR_BF16_INLINE void transpose(const std::uint32_t* from, std::int64_t rows, std::int64_t columns, std::uint32_t* to) {
    for (std::int64_t r = 0; r < rows; r += 16) {
        for (std::int64_t c = 0; c < columns; c += 16) {
            transpose_block(from + r * columns + c, columns, to + c * rows + r, rows);
        }
    }
}

// 2^x for x ≤ 0, to 4e-6 relative, a thousandth of a bfloat16's last place; NaN stays.
MIMIR_BF16_INLINE __m512 exp2_of_nonpositive(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x), in [0, 1)
    __m512 p = _mm512_set1_ps(0.01353417f);  // the polynomial of degree 4 with the least relative error
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05201146f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24144276f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69300383f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, x);  // floors x itself
}

}  // namespace mimir
#endif
