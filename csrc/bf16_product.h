// Products of tall bfloat16 matrices with weights, and of two tall ones (a weight's gradient), from packed operands.
//
// The right operand comes in panels of 32 columns, two rows interleaved (bf16_matrix.h), K numbers deep: one panel of
// 512 of them lies in the first-level cache while the rows of the left operand pass by.
// Legend: M rows (tokens), N outputs, K inputs of a layer. Everything is padded with zeros to multiples of 32.
#pragma once

#include "bf16_matrix.h"
#include "scratch.h"

#ifdef MIMIR_BF16_MATRIX
// GCC's own intrinsics start from registers they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace mimir {

constexpr std::int64_t kPanel = 32, kInner = 512;

// Numbers of a multiple of 32 columns, plus one cache line so that rows do not fall into the same sets.
inline std::int64_t row_length(std::int64_t columns) { return padded(columns, kPanel) + kPanel; }

// A matrix in memory as PyTorch has it: dense rows of float32 (`wide`) or bfloat16.
struct Matrix {
    char* data;
    bool wide;
    std::int64_t columns;

    MIMIR_BF16_INLINE __m512 load(std::int64_t row, std::int64_t column, __mmask16 inside = 0xffff) const {
        const std::int64_t at = row * columns + column;
        if (wide) return _mm512_maskz_loadu_ps(inside, data + 4 * at);
        return from_bf16(_mm256_maskz_loadu_epi16(inside, data + 2 * at));
    }
    MIMIR_BF16_INLINE void store(std::int64_t row, std::int64_t column, __m512 x, __mmask16 inside = 0xffff) const {
        const std::int64_t at = row * columns + column;
        if (wide) {
            _mm512_mask_storeu_ps(data + 4 * at, inside, x);
        } else {
            _mm256_mask_storeu_epi16(data + 2 * at, inside, to_bf16(x));
        }
    }
    // Columns column … column + 31 are going to be read, or written, soon.
    MIMIR_BF16_INLINE void prefetch(std::int64_t row, std::int64_t column, bool write) const {
        const char* at = data + (row * columns + column) * (wide ? 4 : 2);
        for (int line = 0; line < (wide ? 128 : 64); line += 64) {
            write ? __builtin_prefetch(at + line, 1) : __builtin_prefetch(at + line, 0);
        }
    }
    // Whether rows are made of whole lines of 64 bytes. Such a line can go to memory without being read first, which is
    // the faster way where it is not wanted soon: strided writes to cold memory wait for every single line.
    bool whole_lines() const {
        return columns * (wide ? 4 : 2) % 64 == 0 && reinterpret_cast<std::uintptr_t>(data) % 64 == 0;
    }
    MIMIR_BF16_INLINE void stream(std::int64_t row, std::int64_t column, __m512 x) const {
        _mm512_stream_ps(reinterpret_cast<float*>(data) + row * columns + column, x);
    }
};

// `finish.prepare(row)` where there is such a thing.
template <typename Finish>
MIMIR_BF16_INLINE auto prepare(const Finish& finish, std::int64_t row, int) -> decltype(finish.prepare(row)) {
    finish.prepare(row);
}
template <typename Finish>
MIMIR_BF16_INLINE void prepare(const Finish&, std::int64_t, long) {}

// `panel_product` without tiles. Sums stay in registers all the way down, since the panel comes from the second-level
// cache as fast as it is used; rows are finished block by block, while they lie in the first-level cache.
template <typename Finish>
MIMIR_BF16_INLINE void avx512_panel_product(MatrixA a, std::int64_t rows, const std::uint32_t* panel, std::int64_t depth,
                                            MatrixC c, const Finish& finish) {
    for (std::int64_t row = 0; row < rows; row += kBlockRows) {
        for (std::int64_t r = row; r < row + kBlockRows; ++r) prepare(finish, r, 0);
        const MatrixA a_m = {a.data + row * a.stride, a.stride};
        const MatrixC c_m = {c.data + row * c.stride, c.stride};
        avx512_block<kBlockRows, 2>(a_m, {panel, kPanel}, c_m, depth, false);
        for (std::int64_t r = row; r < row + kBlockRows; ++r) finish(r);
    }
}

// One panel: rows (a multiple of 32) of A (depth long, a multiple of 32) times a panel of B → C. `finish(row)` is called
// for each row of C that is complete, for 32 of them while the tiles multiply the next 32; `finish.prepare(row)` 32 rows
// ahead of that, so that what it will touch is on its way from memory.
template <typename Finish>
MIMIR_BF16_INLINE void panel_product(bool amx, MatrixA a, std::int64_t rows, const std::uint32_t* panel,
                                     std::int64_t depth, MatrixC c, const Finish& finish) {
    if (!amx) return avx512_panel_product(a, rows, panel, depth, c, finish);
    std::int64_t k = 0;
    for (; k + kInner < depth; k += kInner) {
        multiply(true, rows, kPanel, kInner, {a.data + k, a.stride}, {panel + k / 2 * kPanel, kPanel}, c, k > 0);
    }
    const std::int64_t inner = depth - k, each = (kPanel * 32 + inner - 1) / inner;  // rows finished a step
    std::int64_t next = 0, ahead = 0;
    for (std::int64_t row = 0; row < rows; row += kPanel) {
        const MatrixA a_m = {a.data + row * a.stride + k, a.stride};
        const MatrixB b = {panel + k / 2 * kPanel, kPanel};
        const MatrixC c_m = {c.data + row * c.stride, c.stride};
        amx_block<2, 2>(a_m, b, c_m, inner, k > 0, [&](std::int64_t) MIMIR_BF16_LAMBDA {
            for (const std::int64_t last = std::min(next + each, row); next < last; ++next) finish(next);
            for (const std::int64_t last = std::min(ahead + each, row + kPanel); ahead < last; ++ahead) {
                prepare(finish, ahead, 0);
            }
        });
    }
    for (; next < rows; ++next) finish(next);
}

MIMIR_BF16_INLINE void panel_product(bool amx, MatrixA a, std::int64_t rows, const std::uint32_t* panel,
                                     std::int64_t depth, MatrixC c) {
    panel_product(amx, a, rows, panel, depth, c, Nothing());
}

// Panel `index` of Wᵀ, for x Wᵀ: columns are rows of the weight, pairs run along K.
MIMIR_BF16_INLINE void pack_rows(const Matrix& weight, std::int64_t N, std::int64_t index, std::uint32_t* to) {
    const std::int64_t K = weight.columns;
    alignas(64) std::uint32_t block[16 * 16];
    for (std::int64_t k = 0; k < K; k += 32) {
        for (std::int64_t half = 0; half < kPanel; half += 16) {
            for (std::int64_t i = 0; i < 16; ++i) {
                const std::int64_t n = index * kPanel + half + i;
                const __mmask16 first = n < N ? lanes(K - k) : 0, second = n < N ? lanes(K - k - 16) : 0;
                _mm256_store_si256((__m256i*)(block + 16 * i), to_bf16(weight.load(n, k, first)));
                _mm256_store_si256((__m256i*)(block + 16 * i + 8), to_bf16(weight.load(n, k + 16, second)));
            }
            transpose_block(block, 16, to + k / 2 * kPanel + half, kPanel);
        }
    }
}

// Rows [row, row + rows) of panel `index` of a weight (end, columns) for g W: pairs run down its rows, `row` is even. It is
// streamed, since it is for the backward pass. Rows from `end` on are zeros; `to` is aligned to 64 bytes.
MIMIR_BF16_INLINE void pack_columns(const Matrix& x, std::int64_t row, std::int64_t end, std::int64_t rows,
                                    std::int64_t index, std::uint32_t* to) {
    for (std::int64_t half = 0; half < kPanel; half += 16) {
        const std::int64_t column = index * kPanel + half;
        const __mmask16 inside = lanes(x.columns - column);
        for (std::int64_t r = row; r < row + rows; r += 2) {
            const __m256i even = to_bf16(x.load(r, column, r < end ? inside : 0));
            const __m256i odd = to_bf16(x.load(r + 1, column, r + 1 < end ? inside : 0));
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + (r - row) / 2 * kPanel + half), interleave(even, odd));
        }
    }
}

// (rows, columns) bfloat16 at `from`, rows a multiple of 32 → (columns, rows) at `to`.
MIMIR_BF16_INLINE void turn(const std::uint16_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                            std::uint16_t* to, std::int64_t to_stride) {
    alignas(64) std::uint32_t block[16 * 16];
    for (std::int64_t r = 0; r < rows; r += 32) {
        for (std::int64_t c = 0; c < columns; c += 16) {
            pair_rows(from + r * stride + c, stride, 32, 16, block);
            transpose_block(block, 16, reinterpret_cast<std::uint32_t*>(to + c * to_stride + r), to_stride / 2);
        }
    }
}

// The two operands of a weight's gradient gᵀ x, filled a few rows at a time, and the gradient itself.
struct WeightGradient {
    std::int64_t M, N, K;
    std::uint16_t* turned;  // gᵀ, (N, M)
    std::uint32_t* panels;  // of x, (K/32, M/2, 32)

    WeightGradient(std::int64_t rows, std::int64_t outputs, std::int64_t inputs, Scratch<Use::shared>& scratch)
        : M(padded(rows, kPanel)), N(outputs), K(inputs) {
        turned = scratch.take<std::uint16_t>(padded(N, kPanel) * row_length(M));
        panels = scratch.take<std::uint32_t>(padded(K, kPanel) * M / 2);
    }
    static std::int64_t bytes(std::int64_t rows, std::int64_t outputs, std::int64_t inputs) {
        return 2 * padded(outputs, kPanel) * row_length(rows) + 2 * padded(inputs, kPanel) * padded(rows, kPanel) + 256;
    }
    // Rows [row, row + rows) of g and x in bfloat16 (rows a multiple of 32, zeros behind the last).
    MIMIR_BF16_INLINE void take(std::int64_t row, std::int64_t rows, MatrixA g, MatrixA x) const {
        turn(g.data, g.stride, rows, padded(N, kPanel), turned + row, row_length(M));
        for (std::int64_t k = 0; k < K; k += kPanel) {
            std::uint32_t* to = panels + k * M / 2 + row / 2 * kPanel;
            for (std::int64_t half = 0; half < kPanel; half += 16) {
                for (std::int64_t r = 0; r < rows; r += 2) {
                    const auto* from = x.data + r * x.stride + k + half;
                    const __m256i even = _mm256_loadu_si256((const __m256i*)from);
                    const __m256i odd = _mm256_loadu_si256((const __m256i*)(from + x.stride));
                    _mm512_storeu_si512(to + r / 2 * kPanel + half, interleave(even, odd));
                }
            }
        }
    }
    // Blocks of 32 rows [begin, end) of the weight's gradient (N, K), and of the bias's: sums over the rows of g.
    MIMIR_BF16_INLINE void write(bool amx, std::int64_t begin, std::int64_t end, float* weight, float* bias) const {
        const std::int64_t rows = (end - begin) * kPanel, stride = row_length(M);
        Scratch<Use::own> scratch(4 * rows * kPanel + 64);
        auto* c = scratch.take<float>(rows * kPanel);
        const std::uint16_t* g = turned + begin * kPanel * stride;
        const Matrix out = {reinterpret_cast<char*>(weight), true, K};
        const bool streams = out.whole_lines();
        const std::int64_t last = std::min(N - begin * kPanel, rows);
        for (std::int64_t k = 0; k < K; k += kPanel) {
            panel_product(amx, {g, stride}, rows, panels + k * M / 2, M, {c, kPanel});
            for (std::int64_t n = 0; n < last; ++n) {
                for (std::int64_t half = 0; half < std::min(kPanel, K - k); half += 16) {
                    const __m512 x = _mm512_loadu_ps(c + n * kPanel + half);
                    if (streams) {
                        out.stream(begin * kPanel + n, k + half, x);
                    } else {
                        out.store(begin * kPanel + n, k + half, x, lanes(K - k - half));
                    }
                }
            }
        }
        _mm_sfence();  // what was streamed is there before another thread reads it
        if (bias == nullptr) return;
        const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        for (std::int64_t n = 0; n < last; ++n) {
            __m512 sum = _mm512_setzero_ps();
            for (std::int64_t m = 0; m < M; m += 32) {
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(g + n * stride + m), ones);
            }
            bias[begin * kPanel + n] = _mm512_reduce_add_ps(sum);
        }
    }
};

}  // namespace mimir
#endif
