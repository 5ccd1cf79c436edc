// Softmax attention for heads of 8 numbers, as in the light decoder: 16 heads, some 200 tokens.
//
// Such a head's keys and values fit the first-level cache, so nothing is tiled: they are transposed once, and then one
// query at a time meets all keys, a vector of keys at a time. General kernels spend their time on matrix products with
// an inner dimension of 8. Heads are independent and each is one thread's, so the number of threads does not change a
// bit of the result.
//
// Legend: B images, T queries, S keys, H heads of E numbers; q (B, T, H, E), k and v (B, S, H, E) with the heads
// of a token in one piece; s_j = scale q·k_j, p = softmax(s), o = Σ p_j v_j, lse = log Σ exp s_j.
// Backward: dp_j = do·v_j, ds_j = scale p_j (dp_j − do·o), dq = Σ ds_j k_j, dk_j = Σ_t ds_j q, dv_j = Σ_t p_j do.
#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings.h"
#include "exponential.h"
#include "multiversion.h"
#include "parallel.h"

namespace mimir {
namespace {

constexpr int E = 8;
constexpr int kLanes = 16;  // rows of the transposed arrays begin at multiples of a vector

// Tokens of one tensor: the numbers of head h of token t of image b are E floats from `at(b, t, h)` on.
struct Tokens {
    float* data;
    std::int64_t batch_stride, token_stride;

    MIMIR_INLINE float* at(std::int64_t b, std::int64_t t, std::int64_t h) const {
        return data + b * batch_stride + t * token_stride + h * E;
    }
};

struct Problem {
    std::int64_t T, S, H;
    float scale;
    Tokens q, k, v, out;
    float* lse;  // (B, H, T)
    Tokens grad, dq, dk, dv;  // backward only
};

MIMIR_INLINE void transpose(const Tokens& tokens, std::int64_t b, std::int64_t h, std::int64_t S, std::int64_t width,
                            float* to) {
    for (std::int64_t j = 0; j < S; ++j) {
        const float* from = tokens.at(b, j, h);
        for (int e = 0; e < E; ++e) to[e * width + j] = from[e];
    }
}

// row[j] = factor * Σ_e x_e columns[e][j]
MIMIR_INLINE void products(const float* x, const float* columns, std::int64_t width, float factor, float* row) {
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) {
        float sum = 0.0f;
        for (int e = 0; e < E; ++e) sum += x[e] * columns[e * width + j];
        row[j] = factor * sum;
    }
}

// to_e = Σ_j row[j] columns[e][j]
MIMIR_INLINE void weighted_sum(const float* row, const float* columns, std::int64_t width, float* to) {
    float sums[E][kLanes] = {};  // registers
    for (std::int64_t j = 0; j < width; j += kLanes) {
        for (int e = 0; e < E; ++e) {
#pragma omp simd
            for (int lane = 0; lane < kLanes; ++lane) sums[e][lane] += row[j + lane] * columns[e * width + j + lane];
        }
    }
    for (int e = 0; e < E; ++e) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int lane = 0; lane < kLanes; ++lane) sum += sums[e][lane];
        to[e] = sum;
    }
}

MIMIR_MULTIVERSION
void forward_heads(const Problem& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = (p.S + kLanes - 1) / kLanes * kLanes;
    std::vector<float> memory((2 * E + 1) * width);  // zeros, of which the columns beyond S stay
    float *keys = memory.data(), *values = keys + E * width, *row = values + E * width;
    for (std::int64_t head = begin; head < end; ++head) {
        const std::int64_t b = head / p.H, h = head % p.H;
        transpose(p.k, b, h, p.S, width, keys);
        transpose(p.v, b, h, p.S, width, values);
        for (std::int64_t t = 0; t < p.T; ++t) {
            products(p.q.at(b, t, h), keys, width, p.scale, row);
            float largest = row[0];
#pragma omp simd reduction(max : largest)
            for (std::int64_t j = 0; j < p.S; ++j) largest = row[j] > largest ? row[j] : largest;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (std::int64_t j = 0; j < p.S; ++j) {
                row[j] = exp_of_nonpositive(row[j] - largest);
                sum += row[j];
            }
            float* out = p.out.at(b, t, h);
            weighted_sum(row, values, width, out);
            for (int e = 0; e < E; ++e) out[e] /= sum;
            p.lse[head * p.T + t] = largest + std::log(sum);
        }
    }
}

MIMIR_MULTIVERSION
void backward_heads(const Problem& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = (p.S + kLanes - 1) / kLanes * kLanes;
    std::vector<float> memory((4 * E + 2) * width);  // zeros, as above
    float *keys = memory.data(), *values = keys + E * width, *d_keys = values + E * width;
    float *d_values = d_keys + E * width, *row = d_values + E * width, *d_row = row + width;
    for (std::int64_t head = begin; head < end; ++head) {
        const std::int64_t b = head / p.H, h = head % p.H;
        transpose(p.k, b, h, p.S, width, keys);
        transpose(p.v, b, h, p.S, width, values);
        std::fill(d_keys, row, 0.0f);
        for (std::int64_t t = 0; t < p.T; ++t) {
            const float *q = p.q.at(b, t, h), *out = p.out.at(b, t, h), *grad = p.grad.at(b, t, h);
            const float lse = p.lse[head * p.T + t];
            float along = 0.0f;
            for (int e = 0; e < E; ++e) along += grad[e] * out[e];
            products(q, keys, width, p.scale, row);
            products(grad, values, width, 1.0f, d_row);
#pragma omp simd
            for (std::int64_t j = 0; j < p.S; ++j) {
                const float s = row[j] - lse;
                const float prob = exp_of_nonpositive(s > 0.0f ? 0.0f : s);  // by rounding only
                row[j] = prob;
                d_row[j] = p.scale * (prob * (d_row[j] - along));
            }
            weighted_sum(d_row, keys, width, p.dq.at(b, t, h));
            for (int e = 0; e < E; ++e) {
                float *d_key = d_keys + e * width, *d_value = d_values + e * width;
                const float q_e = q[e], grad_e = grad[e];
#pragma omp simd
                for (std::int64_t j = 0; j < p.S; ++j) {
                    d_key[j] += d_row[j] * q_e;
                    d_value[j] += row[j] * grad_e;
                }
            }
        }
        for (std::int64_t j = 0; j < p.S; ++j) {
            float *dk = p.dk.at(b, j, h), *dv = p.dv.at(b, j, h);
            for (int e = 0; e < E; ++e) {
                dk[e] = d_keys[e * width + j];
                dv[e] = d_values[e * width + j];
            }
        }
    }
}

// (B, tokens, H, E) contiguous.
Tokens whole(Address address, std::int64_t tokens, std::int64_t token_size) {
    return {pointer<float>(address), tokens * token_size, token_size};
}

Problem problem(std::int64_t T, std::int64_t S, std::int64_t H, const std::vector<std::int64_t>& strides, Address q,
                Address k, Address v, Address out, Address lse) {
    Problem p{};
    p.T = T;
    p.S = S;
    p.H = H;
    p.scale = 1.0f / std::sqrt(static_cast<float>(E));
    p.q = {pointer<float>(q), strides[0], strides[1]};
    p.k = {pointer<float>(k), strides[2], strides[3]};
    p.v = {pointer<float>(v), strides[4], strides[5]};
    p.out = whole(out, T, H * E);
    p.lse = pointer<float>(lse);
    return p;
}

// strides: (image, token) of q, k and v, backwards also of their gradients, in elements; out and lse are contiguous.
void forward(Address q, Address k, Address v, Address out, Address lse, std::int64_t B, std::int64_t T, std::int64_t S,
             std::int64_t H, const std::vector<std::int64_t>& strides, int threads) {
    const Problem p = problem(T, S, H, strides, q, k, v, out, lse);
    parallel_for(B * H, 1, threads, [&](std::int64_t begin, std::int64_t end) { forward_heads(p, begin, end); });
}

void backward(Address grad, Address q, Address k, Address v, Address out, Address lse, Address dq, Address dk,
              Address dv, std::int64_t B, std::int64_t T, std::int64_t S, std::int64_t H,
              const std::vector<std::int64_t>& strides, int threads) {
    Problem p = problem(T, S, H, strides, q, k, v, out, lse);
    p.grad = whole(grad, T, H * E);
    p.dq = {pointer<float>(dq), strides[6], strides[7]};
    p.dk = {pointer<float>(dk), strides[8], strides[9]};
    p.dv = {pointer<float>(dv), strides[10], strides[11]};
    parallel_for(B * H, 1, threads, [&](std::int64_t begin, std::int64_t end) { backward_heads(p, begin, end); });
}

}  // namespace

void bind_small_head_attention(pybind11::module_& module) {
    module.def("small_head_attention", &forward, Unlocked());
    module.def("small_head_attention_backward", &backward, Unlocked());
}

}  // namespace mimir
