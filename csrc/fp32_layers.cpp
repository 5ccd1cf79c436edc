// What stands around the matrix products of a transformer's layers in float32: layer normalisation and GELU, with their
// derivatives. The products themselves are the BLAS's (mimir_fast/layers/_fp32.py).
//
// One pass over memory each. Sums over rows are taken in blocks of 32 rows and then in the blocks' order, so that the
// number of threads does not change a bit.
//
// Legend: M rows of K numbers (x), or of H (the hidden layer: h = u + bias with u the product as it comes).
#include <cmath>

#include "exponential.h"
#include "functions.h"
#include "multiversion.h"
#include "parallel.h"

namespace mimir {
namespace {

constexpr std::int64_t kBlock = 32;  // rows

std::int64_t blocks_of(std::int64_t M) { return (M + kBlock - 1) / kBlock; }

// Nothing here has to round as the definition does, so a multiplication and an addition may be one instruction.
MIMIR_CONTRACT

// GELU(x) = x Φ(x), with derivative Φ(x) + x φ(x).
struct Gelu {
    float value, slope;
};

// 2^y for y <= 0.
MIMIR_INLINE float exp2_of_nonpositive(float y) {
    y = y < -126.0f ? -126.0f : y;  // written so that a NaN stays
    const float shifted = y + 12582912.0f;  // 1.5·2^23: leaves the nearest integer in the low bits
    const float f = y - (shifted - 12582912.0f);
    float p = kExp2[6] * f + kExp2[5];
#pragma GCC unroll 5
    for (int n = 4; n >= 0; --n) p = p * f + kExp2[n];
    return bits_of<float>(bits_of<std::uint32_t>(p) + (bits_of<std::uint32_t>(shifted) << 23));
}

// With a = |x|: Φ(−a) = exp(−a²/2) R(a), where R is a polynomial in t = 1/(1 + 0.34 a), the minimax one of relative error
// 3e-8 for a ≤ 14. So the tail is right in relative terms, unlike (1 + erf)/2, and the slope costs one product more. In
// float32 Φ is within 1.3e-7.
MIMIR_INLINE Gelu gelu(float x) {
    const float a = std::fabs(x);
    const float t = 1.0f / (0.34f * a + 1.0f);
    float p = -0.02612046f * t + 0.13949938f;
    p = p * t - 0.27313246f;
    p = p * t + 0.20218229f;
    p = p * t - 0.04471816f;
    p = p * t + 0.11535903f;
    p = p * t + 0.11519769f;
    p = p * t + 0.13611219f;
    p = p * t + 0.13562050f;
    constexpr float kEnd = 13.0f;  // x Φ(x) is 1e-37 there
    const float e = a > kEnd ? 0.0f : exp2_of_nonpositive(-0.72134752f * a * a);  // log2(e)/2
    const float tail = e * (p * t);
    const float tail_slope = tail - 0.39894228f * a * e;  // 1/√(2π)
    return {x * (x > 0.0f ? 1.0f - tail : tail), x > 0.0f ? 1.0f - tail_slope : tail_slope};
}

MIMIR_MULTIVERSION
void gelu_rows(const float* u, const float* bias, float* out, std::int64_t H, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        const float* from = u + row * H;
        float* to = out + row * H;
#pragma omp simd  // in place or disjoint
        for (std::int64_t i = 0; i < H; ++i) to[i] = gelu(from[i] + bias[i]).value;
    }
}

struct Hidden {
    const float *u, *bias;
    float *grad;  // of GELU's output → of its input
    float *activated, *sums;  // nullptr: no gradients of parameters are wanted
    std::int64_t M, H;
};

MIMIR_MULTIVERSION
void gelu_backward_blocks(const Hidden& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t H = p.H;
    const float* bias = p.bias;
    for (std::int64_t row = begin * kBlock; row < std::min(end * kBlock, p.M); ++row) {
        const float* u = p.u + row * H;
        float* grad = p.grad + row * H;
        if (p.sums == nullptr) {
#pragma omp simd
            for (std::int64_t i = 0; i < H; ++i) grad[i] *= gelu(u[i] + bias[i]).slope;
            continue;
        }
        float* activated = p.activated + row * H;
        float* sums = p.sums + row / kBlock * H;
        if (row % kBlock == 0) std::fill(sums, sums + H, 0.0f);
#pragma omp simd
        for (std::int64_t i = 0; i < H; ++i) {
            const Gelu at = gelu(u[i] + bias[i]);
            const float product = grad[i] * at.slope;
            activated[i] = at.value;
            grad[i] = product;
            sums[i] += product;
        }
    }
}

MIMIR_END_CONTRACT

}  // namespace

// out may be u.
void fp32_gelu(Address u, Address bias, Address out, std::int64_t M, std::int64_t H, int threads) {
    parallel_for(M, 8, threads, [&](std::int64_t begin, std::int64_t end) {
        gelu_rows(pointer<float>(u), pointer<float>(bias), pointer<float>(out), H, begin, end);
    });
}

// grad (M, H) in place; activated (M, H) and sums (⌈M/32⌉, H) both or neither.
void fp32_gelu_backward(Address u, Address bias, Address grad, Address activated, Address sums, std::int64_t M,
                        std::int64_t H, int threads) {
    const Hidden p = {pointer<float>(u), pointer<float>(bias), pointer<float>(grad), pointer<float>(activated),
                      pointer<float>(sums), M, H};
    parallel_for(blocks_of(M), 1, threads,
                 [&](std::int64_t begin, std::int64_t end) { gelu_backward_blocks(p, begin, end); });
}

namespace {

struct Norm {
    const float *x, *gamma, *beta;
    float eps;
    float* statistics;  // (M, 2): mean and 1/deviation
    std::int64_t M, K;
};

MIMIR_INLINE void moments(const float* x, std::int64_t K, float eps, float* statistics) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < K; ++k) sum += x[k];
    const float mean = sum / static_cast<float>(K);
#pragma omp simd reduction(+ : squares)
    for (std::int64_t k = 0; k < K; ++k) squares += (x[k] - mean) * (x[k] - mean);
    statistics[0] = mean;
    statistics[1] = 1.0f / std::sqrt(squares / static_cast<float>(K) + eps);
}

MIMIR_MULTIVERSION
void norm_rows(const Norm& p, bool known, float* out, std::int64_t begin, std::int64_t end) {
    const float *gamma = p.gamma, *beta = p.beta;
    for (std::int64_t row = begin; row < end; ++row) {
        const float* x = p.x + row * p.K;
        float* to = out + row * p.K;
        if (!known) moments(x, p.K, p.eps, p.statistics + 2 * row);
        const float mean = p.statistics[2 * row], scale = p.statistics[2 * row + 1];
#pragma omp simd
        for (std::int64_t k = 0; k < p.K; ++k) to[k] = (x[k] - mean) * scale * gamma[k] + beta[k];
    }
}

}  // namespace

// statistics: written, or read if `known`.
void fp32_norm(Address x, Address gamma, Address beta, double eps, bool known, Address statistics, Address out,
               std::int64_t M, std::int64_t K, int threads) {
    const Norm p = {pointer<float>(x), pointer<float>(gamma), pointer<float>(beta), static_cast<float>(eps),
                    pointer<float>(statistics), M, K};
    parallel_for(M, 16, threads,
                 [&](std::int64_t begin, std::int64_t end) { norm_rows(p, known, pointer<float>(out), begin, end); });
}

namespace {

// grad: of the normalised rows → of x, plus `along`, the gradient of a residual (or nullptr).
MIMIR_MULTIVERSION
void norm_backward_blocks(const Norm& p, float* grads, const float* alongs, float* all_sums, std::int64_t begin,
                          std::int64_t end) {
    const std::int64_t K = p.K;
    const float* gamma = p.gamma;
    for (std::int64_t row = begin * kBlock; row < std::min(end * kBlock, p.M); ++row) {
        const float* x = p.x + row * K;
        float* grad = grads + row * K;
        const float mean = p.statistics[2 * row], scale = p.statistics[2 * row + 1];
        if (all_sums != nullptr) {
            float *to_gamma = all_sums + row / kBlock * 2 * K, *to_beta = to_gamma + K;
            if (row % kBlock == 0) std::fill(to_gamma, to_gamma + 2 * K, 0.0f);
#pragma omp simd
            for (std::int64_t k = 0; k < K; ++k) {
                to_gamma[k] += grad[k] * ((x[k] - mean) * scale);
                to_beta[k] += grad[k];
            }
        }
        float sum = 0.0f, projection = 0.0f;
#pragma omp simd reduction(+ : sum, projection)
        for (std::int64_t k = 0; k < K; ++k) {
            const float d = grad[k] * gamma[k];
            sum += d;
            projection += d * ((x[k] - mean) * scale);
        }
        sum /= static_cast<float>(K);
        projection /= static_cast<float>(K);
        if (alongs == nullptr) {
#pragma omp simd
            for (std::int64_t k = 0; k < K; ++k) {
                grad[k] = (grad[k] * gamma[k] - sum - (x[k] - mean) * scale * projection) * scale;
            }
        } else {
            const float* along = alongs + row * K;
#pragma omp simd
            for (std::int64_t k = 0; k < K; ++k) {
                grad[k] = (grad[k] * gamma[k] - sum - (x[k] - mean) * scale * projection) * scale + along[k];
            }
        }
    }
}

}  // namespace

// grad (M, K) in place; sums (⌈M/32⌉, 2, K) for gamma and beta, or nowhere (0).
void fp32_norm_backward(Address x, Address gamma, Address statistics, Address along, Address grad, Address sums,
                        std::int64_t M, std::int64_t K, int threads) {
    const Norm p = {pointer<float>(x), pointer<float>(gamma), nullptr, 0.0f, pointer<float>(statistics), M, K};
    parallel_for(blocks_of(M), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        norm_backward_blocks(p, pointer<float>(grad), pointer<float>(along), pointer<float>(sums), begin, end);
    });
}

}  // namespace mimir
