// Softmax attention in bfloat16 for short sequences, a head at a time, without a matrix of scores in memory.
//
// A head of a masked autoencoder (50 to 200 tokens of 8 to 64 numbers) fits the second-level cache whole. It is padded
// and rearranged once; then come a few queries at a time, products on AMX tiles (bf16_matrix.h), and the softmax in
// float32 while the scores lie in the first-level cache. Scores stand as (keys, queries), so that the sums of a softmax
// run down the vectors, and what comes out is already the operand of the next product.
// Heads are independent and each is one thread's, so the number of threads does not change a bit of the result.
//
// Legend as in fp32_attention.cpp: B images, T queries, S keys, H heads of E numbers. Padded with zeros: T and S
// to multiples of 32, E to kDepth = 32 as an inner dimension and to 16 as an outer one. C queries at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attention_heads.h"
#include "bf16_matrix.h"
#include "bf16_scores.h"
#include "functions.h"
#include "parallel.h"
#include "processor.h"
#include "scratch.h"

namespace mimir {

#ifdef MIMIR_BF16_MATRIX
namespace {

// GCC's own intrinsics start from registers they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

constexpr std::int64_t kDepth = 32;
constexpr std::int64_t kForwardQueries = 32, kBackwardQueries = 128, kKeys = 64;

using Tokens = HeadTokens<std::uint16_t>;

struct Problem : Heads<std::uint16_t> {
    bool amx;

    // Heads of 8 numbers without tiles go their own way: bf16_scores.h. In the backward pass two keys share a vector.
    bool two_keys() const { return E == 8 && !amx; }
    // What products go through: all the padding only where tiles have to be whole. Queries, keys, and the numbers of a
    // head as inner and as outer dimension.
    std::int64_t queries_used() const { return padded(T, amx ? 32 : 16); }
    std::int64_t keys_used() const { return padded(S, amx ? 32 : two_keys() ? 16 : kBlockRows); }
    std::int64_t depth_used() const { return amx ? padded(E, kDepth) : E; }
    std::int64_t numbers_used() const { return amx ? padded(E, 16) : E; }
};

// Tokens of head h → (rows, depth), depth a multiple of 32, zeros around.
MIMIR_BF16_INLINE void pad(const Tokens& tokens, std::int64_t b, std::int64_t h, std::int64_t count, std::int64_t rows,
                           std::int64_t depth, std::uint16_t* to) {
    for (std::int64_t t = 0; t < count; ++t) {
        const std::uint16_t* from = tokens.at(b, t, h);
        for (std::int64_t e = 0; e < depth; e += 32) {
            _mm512_storeu_si512(to + t * depth + e, _mm512_maskz_loadu_epi16(wide_lanes(tokens.E - e), from + e));
        }
    }
    std::memset(to + count * depth, 0, (rows - count) * depth * 2);
}

// Tokens from `pad` → (depth/2, rows) pairs of numbers; of heads of 8 without tiles only the 4 that products go through.
MIMIR_BF16_INLINE void turn_tokens(const std::uint16_t* from, std::int64_t rows, std::int64_t depth, std::int64_t used,
                                   std::uint32_t* to) {
    const auto* pairs = reinterpret_cast<const std::uint32_t*>(from);
    if (used != 8) return transpose(pairs, rows, depth / 2, to);
    for (std::int64_t r = 0; r < rows; r += 16) transpose_narrow_block(pairs + r * depth / 2, depth / 2, to + r, rows);
}

// The head's tokens are on their way from memory. They lie a whole token apart, which no processor foresees.
MIMIR_BF16_INLINE void prefetch(const Tokens& tokens, std::int64_t head, std::int64_t heads, std::int64_t count,
                                bool write) {
    for (std::int64_t t = 0; t < count; ++t) {
        const auto* at = reinterpret_cast<const char*>(tokens.at(head / heads, t, head % heads));
        for (std::int64_t byte = 0; byte < 2 * tokens.E; byte += 64) {
            write ? __builtin_prefetch(at + byte, 1) : __builtin_prefetch(at + byte, 0);
        }
    }
}

// (rows, columns) float32, columns a multiple of 16, scaled → the bfloat16 tokens of head h.
MIMIR_BF16_INLINE void write(const float* from, std::int64_t columns, float scale, const Tokens& tokens, std::int64_t b,
                             std::int64_t first, std::int64_t count, std::int64_t h) {
    for (std::int64_t t = 0; t < count; ++t) {
        std::uint16_t* to = tokens.at(b, first + t, h);
        for (std::int64_t e = 0; e < tokens.E; e += 16) {
            const __m256i x = to_bf16(_mm512_mul_ps(_mm512_loadu_ps(from + t * columns + e), _mm512_set1_ps(scale)));
            if (tokens.E - e >= 16) {
                _mm256_storeu_si256((__m256i*)(to + e), x);
            } else {
                _mm_storeu_si128((__m128i*)(to + e), _mm256_castsi256_si128(x));
            }
        }
    }
}

// ln x of x ≥ 1, to 1e-7: ln m = 2 artanh((m − 1)/(m + 1)) for the mantissa m in [1, 2), by its series.
MIMIR_BF16_INLINE __m512 log_of_sum(__m512 x) {
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), one = _mm512_set1_ps(1.0f);
    const __m512 z = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(z, z);
    __m512 p = _mm512_set1_ps(2.0f / 13);
#pragma GCC unroll 6
    for (int n = 11; n > 0; n -= 2) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / n));
    return _mm512_fmadd_ps(p, z, _mm512_mul_ps(_mm512_getexp_ps(x), _mm512_set1_ps(0.693147181f)));
}

// Of 16·kParts queries (keys, 32), over S keys.
template <int kParts>
MIMIR_BF16_INLINE void largest_of(const float* scores, std::int64_t S, __m512* largest) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) largest[i] = _mm512_loadu_ps(scores + 16 * i);
    for (std::int64_t j = S % 2; j < S; j += 2) {
#pragma GCC unroll 2
        for (int i = 0; i < kParts; ++i) {
            const float* x = scores + 32 * j + 16 * i;
            largest[i] = _mm512_max_ps(largest[i], _mm512_max_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 32)));
        }
    }
}

// Scores of 16·kParts queries (keys, 32) → unnormalised probabilities as pairs of keys, 1/their sums, and the lse.
template <int kParts>
MIMIR_BF16_INLINE void softmax(const float* scores, const __m512* largest, std::int64_t S, std::int64_t keys, float scale,
                               std::uint32_t* pairs, float* shares, float* lse) {
    const __m512 to_exponent = _mm512_set1_ps(scale * 1.44269504f);
    // All parts side by side: each is a chain of operations that wait for one another.
    __m512 shift[kParts], sum[kParts];
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
        shift[i] = _mm512_mul_ps(largest[i], to_exponent);
        sum[i] = _mm512_setzero_ps();
    }
    const std::int64_t whole = S / 2 * 2;
    for (std::int64_t j = 0; j < whole; j += 2) {
#pragma GCC unroll 2
        for (int i = 0; i < kParts; ++i) {
            const float* x = scores + 32 * j + 16 * i;
            const __m512 even = exp2_of_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(x), to_exponent, shift[i]));
            const __m512 odd = exp2_of_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(x + 32), to_exponent, shift[i]));
            sum[i] = _mm512_add_ps(sum[i], _mm512_add_ps(even, odd));
            _mm512_storeu_si512(pairs + 16 * j + 16 * i, pairs_of(rows_of(even, odd)));
        }
    }
    for (std::int64_t j = whole; j < keys; j += 2) {  // the last key of an odd number, then padding
#pragma GCC unroll 2
        for (int i = 0; i < kParts; ++i) {
            __m512 p = _mm512_setzero_ps();
            if (j < S) {
                const __m512 x = _mm512_loadu_ps(scores + 32 * j + 16 * i);
                p = exp2_of_nonpositive(_mm512_fmsub_ps(x, to_exponent, shift[i]));
                sum[i] = _mm512_add_ps(sum[i], p);
            }
            _mm512_storeu_si512(pairs + 16 * j + 16 * i, pairs_of(rows_of(p, _mm512_setzero_ps())));
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
        _mm512_storeu_ps(shares + 16 * i, _mm512_div_ps(_mm512_set1_ps(1.0f), sum[i]));
        _mm512_storeu_ps(lse + 16 * i, _mm512_fmadd_ps(largest[i], _mm512_set1_ps(scale), log_of_sum(sum[i])));
    }
}

MIMIR_BF16 void forward_heads(const Problem& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t T = padded(p.T, 32), S = padded(p.S, 32), depth = padded(p.E, kDepth), E = padded(p.E, 16);
    constexpr std::int64_t C = kForwardQueries;
    const std::int64_t keys_used = p.keys_used();
    const float scale = p.scale();
    Scratch<Use::own> scratch(2 * (2 * T * depth + 3 * S * depth + S * E) + 4 * (S * C + S / 2 * C + 2 * E * C) + 1024);
    auto* rows = scratch.take<std::uint16_t>(std::max(T, S) * depth);  // of q, then of v
    auto* keys = scratch.take<std::uint16_t>(S * depth);
    auto* queries = scratch.take<std::uint32_t>(T * depth / 2);  // (depth/2, T)
    auto* value_pairs = scratch.take<std::uint32_t>(S / 2 * E);
    auto* values = scratch.take<std::uint32_t>(E * S / 2);  // (E, S) bfloat16
    auto *scores = scratch.take<float>(S * C), *out = scratch.take<float>(E * C), *turned = scratch.take<float>(E * C);
    auto* probabilities = scratch.take<std::uint32_t>(S / 2 * C);
    float shares[C], lse[C];
    const Tiles tiles(p.amx);
    for (std::int64_t head = begin; head < end; ++head) {
        const std::int64_t b = head / p.H, h = head % p.H;
        pad(p.q, b, h, p.T, T, depth, rows);
        turn_tokens(rows, T, depth, p.depth_used(), queries);
        pad(p.k, b, h, p.S, S, depth, keys);
        pad(p.v, b, h, p.S, S, depth, rows);
        pair_rows(rows, depth, S, E, value_pairs);
        transpose(value_pairs, S / 2, E, values);
        prefetch(p.out, head, p.H, p.T, true);
        if (head + 1 < end) {
            prefetch(p.q, head + 1, p.H, p.T, false);
            prefetch(p.k, head + 1, p.H, p.S, false);
            prefetch(p.v, head + 1, p.H, p.S, false);
        }
        for (std::int64_t t = 0; t < p.T; t += C) {
            const std::int64_t width = std::min(C, p.queries_used() - t);
            __m512 largest[C / 16];
            if (p.two_keys()) {
                for (std::int64_t c = 0; c < width; c += 16) {
                    largest[c / 16] = scores_and_largest({keys, depth}, {queries + t + c, T}, p.S, {scores + c, C});
                }
            } else {
                multiply(p.amx, keys_used, width, p.depth_used(), {keys, depth}, {queries + t, T}, {scores, C}, false);
                width == C ? largest_of<2>(scores, p.S, largest) : largest_of<1>(scores, p.S, largest);
            }
            if (width == C) {
                softmax<2>(scores, largest, p.S, keys_used, scale, probabilities, shares, lse);
            } else {
                softmax<1>(scores, largest, p.S, keys_used, scale, probabilities, shares, lse);
            }
            multiply(p.amx, p.numbers_used(), width, keys_used, {reinterpret_cast<std::uint16_t*>(values), S},
                     {probabilities, C}, {out, C}, false);
            for (std::int64_t c = 0; c < width; c += 16) {
                const __m512 share = _mm512_loadu_ps(shares + c);
                for (std::int64_t e = 0; e < p.numbers_used(); ++e) {
                    float* x = out + e * C + c;
                    _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_loadu_ps(x), share));
                }
            }
            transpose(reinterpret_cast<std::uint32_t*>(out), E, C, reinterpret_cast<std::uint32_t*>(turned));
            const std::int64_t count = std::min(C, p.T - t);
            write(turned, E, 1.0f, p.out, b, t, count, h);
            std::memcpy(p.lse + head * p.T + t, lse, count * sizeof(float));
        }
    }
}

// (keys/2, 16) float32 of two keys each, scaled → the bfloat16 tokens of head h.
MIMIR_BF16_INLINE void write_two_keys(const float* from, float scale, const Tokens& tokens, std::int64_t b,
                                      std::int64_t count, std::int64_t h) {
    const __m512i apart = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    for (std::int64_t t = 0; t < count; t += 2) {
        const __m512 x = _mm512_permutexvar_ps(apart, _mm512_loadu_ps(from + t / 2 * 16));
        const __m256i both = to_bf16(_mm512_mul_ps(x, _mm512_set1_ps(scale)));
        _mm_storeu_si128((__m128i*)tokens.at(b, t, h), _mm256_castsi256_si128(both));
        if (t + 1 < count) _mm_storeu_si128((__m128i*)tokens.at(b, t + 1, h), _mm256_extracti128_si256(both, 1));
    }
}

// Σ_e grad_e out_e of each query.
MIMIR_BF16_INLINE float inner_product(const std::uint16_t* a, const std::uint16_t* b, std::int64_t E) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t e = 0; e < E; e += 32) {
        const __mmask32 inside = wide_lanes(E - e);
        const auto x = (__m512bh)_mm512_maskz_loadu_epi16(inside, a + e), y = (__m512bh)_mm512_maskz_loadu_epi16(inside, b + e);
        sum = _mm512_dpbf16_ps(sum, x, y);
    }
    return _mm512_reduce_add_ps(sum);
}

MIMIR_BF16 void backward_heads(const Problem& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t T = padded(p.T, 32), S = padded(p.S, 32), C = std::min(kBackwardQueries, T);
    const std::int64_t depth = padded(p.E, kDepth), E = padded(p.E, 16);
    const std::int64_t keys_used = p.keys_used();
    const float scale = p.scale();
    const bool two_keys = p.two_keys();
    const auto pair_queries = [&](const std::uint16_t* from, std::uint32_t* to) MIMIR_BF16_LAMBDA {
        two_keys ? pair_rows_twice(from, depth, T, to) : pair_rows(from, depth, T, E, to);
    };
    Scratch<Use::own> scratch(2 * (5 * T + 4 * S) * depth + 2 * 3 * S * C + 4 * (2 * S * E + 2 * E * C + 2 * kKeys * 32 + 2 * T) + 4096);
    auto* rows = scratch.take<std::uint16_t>(T * depth);  // of q, then of grad
    auto *queries = scratch.take<std::uint32_t>(depth / 2 * T), *grads = scratch.take<std::uint32_t>(depth / 2 * T);
    auto *query_pairs = scratch.take<std::uint32_t>(T / 2 * E), *grad_pairs = scratch.take<std::uint32_t>(T / 2 * E);
    auto *keys = scratch.take<std::uint16_t>(S * depth), *values = scratch.take<std::uint16_t>(S * depth);
    auto *key_pairs = scratch.take<std::uint32_t>(S / 2 * E), *turned_keys = scratch.take<std::uint32_t>(E * S / 2);
    auto *scores = scratch.take<float>(kKeys * 32), *products = scratch.take<float>(kKeys * 32);
    auto *lse = scratch.take<float>(T), *along = scratch.take<float>(T);
    auto *probabilities = scratch.take<std::uint16_t>(S * C), *ds = scratch.take<std::uint16_t>(S * C);
    auto* ds_pairs = scratch.take<std::uint32_t>(S / 2 * C);
    auto *dk = scratch.take<float>(S * E), *dv = scratch.take<float>(S * E);
    auto *dq = scratch.take<float>(E * C), *turned = scratch.take<float>(E * C);
    const Tiles tiles(p.amx);
    for (std::int64_t head = begin; head < end; ++head) {
        const std::int64_t b = head / p.H, h = head % p.H;
        pad(p.q, b, h, p.T, T, depth, rows);
        turn_tokens(rows, T, depth, p.depth_used(), queries);
        pair_queries(rows, query_pairs);
        pad(p.grad, b, h, p.T, T, depth, rows);
        turn_tokens(rows, T, depth, p.depth_used(), grads);
        pair_queries(rows, grad_pairs);
        pad(p.k, b, h, p.S, S, depth, keys);
        pad(p.v, b, h, p.S, S, depth, values);
        pair_rows(keys, depth, S, E, key_pairs);
        transpose(key_pairs, S / 2, E, turned_keys);
        for (std::int64_t t = 0; t < T; ++t) {
            const bool inside = t < p.T;
            lse[t] = inside ? p.lse[head * p.T + t] : 0.0f;
            along[t] = inside ? inner_product(p.grad.at(b, t, h), p.out.at(b, t, h), p.E) : 0.0f;
        }
        prefetch(p.dq, head, p.H, p.T, true);
        prefetch(p.dk, head, p.H, p.S, true);
        prefetch(p.dv, head, p.H, p.S, true);
        if (head + 1 < end) {
            prefetch(p.q, head + 1, p.H, p.T, false);
            prefetch(p.grad, head + 1, p.H, p.T, false);
            prefetch(p.out, head + 1, p.H, p.T, false);
            prefetch(p.k, head + 1, p.H, p.S, false);
            prefetch(p.v, head + 1, p.H, p.S, false);
        }
        for (std::int64_t t = 0; t < p.T; t += C) {
            const std::int64_t width = std::min(C, p.queries_used() - t);
            for (std::int64_t c = 0; c < width && two_keys; c += 16) {
                const Operands to = {probabilities + 2 * c, ds + 2 * c, ds_pairs + c, C, true};
                multiply_and_differentiate({keys, depth}, {values, depth}, {queries + t + c, T}, {grads + t + c, T},
                                           keys_used, p.S, scale, lse + t + c, along + t + c, to);
            }
            for (std::int64_t c = 0; c < width && !two_keys; c += 32) {
                const std::int64_t queries_now = std::min<std::int64_t>(32, width - c);
                for (std::int64_t j = 0; j < keys_used; j += kKeys) {
                    const std::int64_t count = std::min(kKeys, keys_used - j);
                    multiply(p.amx, count, queries_now, p.depth_used(), {keys + j * depth, depth}, {queries + t + c, T},
                             {scores, 32}, false);
                    multiply(p.amx, count, queries_now, p.depth_used(), {values + j * depth, depth}, {grads + t + c, T},
                             {products, 32}, false);
                    const std::int64_t at = j * C + c;
                    const Operands to = {probabilities + at, ds + at, ds_pairs + j / 2 * C + c, C, false};
                    differentiate(scores, products, count, p.S - j, queries_now, scale, lse + t + c, along + t + c, to);
                }
            }
            const bool add = t > 0;
            const MatrixB grads_here = {grad_pairs + t / 2 * E, E}, queries_here = {query_pairs + t / 2 * E, E};
            if (two_keys) {
                avx512_multiply_narrow<std::int64_t>(keys_used / 2, width, {probabilities, 2 * C}, grads_here, {dv, E}, add);
                avx512_multiply_narrow<std::int64_t>(keys_used / 2, width, {ds, 2 * C}, queries_here, {dk, E}, add);
            } else {
                multiply(p.amx, keys_used, E, width, {probabilities, C}, grads_here, {dv, E}, add);
                multiply(p.amx, keys_used, E, width, {ds, C}, queries_here, {dk, E}, add);
            }
            multiply(p.amx, p.numbers_used(), width, keys_used, {reinterpret_cast<std::uint16_t*>(turned_keys), S},
                     {ds_pairs, C}, {dq, C}, false);
            transpose(reinterpret_cast<std::uint32_t*>(dq), E, C, reinterpret_cast<std::uint32_t*>(turned));
            write(turned, E, scale, p.dq, b, t, std::min(C, p.T - t), h);
        }
        if (two_keys) {
            write_two_keys(dk, scale, p.dk, b, p.S, h);
            write_two_keys(dv, 1.0f, p.dv, b, p.S, h);
        } else {
            write(dk, E, scale, p.dk, b, 0, p.S, h);
            write(dv, E, 1.0f, p.dv, b, 0, p.S, h);
        }
    }
}

}  // namespace

// strides: see attention_heads.h.
// E: a multiple of 8.
void bf16_attention(Address q, Address k, Address v, Address out, Address lse, std::int64_t B, std::int64_t T,
                    std::int64_t S, std::int64_t H, std::int64_t E, const std::vector<std::int64_t>& strides, bool amx,
                    int threads) {
    const Problem p{heads<std::uint16_t>(T, S, H, E, strides, q, k, v, out, lse), amx};
    parallel_for(B * H, 1, threads, [&](std::int64_t begin, std::int64_t end) { forward_heads(p, begin, end); });
}

void bf16_attention_backward(Address grad, Address q, Address k, Address v, Address out, Address lse, Address dq,
                             Address dk, Address dv, std::int64_t B, std::int64_t T, std::int64_t S, std::int64_t H,
                             std::int64_t E, const std::vector<std::int64_t>& strides, bool amx, int threads) {
    const auto forward = heads<std::uint16_t>(T, S, H, E, strides, q, k, v, out, lse);
    const Problem p{with_gradients(forward, strides, grad, dq, dk, dv), amx};
    parallel_for(B * H, 1, threads, [&](std::int64_t begin, std::int64_t end) { backward_heads(p, begin, end); });
}

// "amx", "avx512", or "" where neither is there and the two functions above must not be called.
std::string bf16_unit(int) {
    return unit() == Unit::amx ? "amx" : unit() == Unit::avx512_bf16 ? "avx512" : "";
}

#else
std::string bf16_unit(int) { return ""; }
#endif

}  // namespace mimir
