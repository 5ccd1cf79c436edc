// x_adv <- project(clamp(x_adv + alpha * sign(grad))): one read of three tensors, one write, instead of seven passes.
//
// Equal to mimir_fast.ops.linf_step.linf_step_reference bit for bit, NaNs included (-ffp-contract=off keeps it so).
#include "functions.h"
#include "multiversion.h"
#include "parallel.h"

namespace mimir {
namespace {

struct Step {
    float alpha, low, high;
};

MIMIR_INLINE float updated(float x_adv, float grad, float x, float eps, const Step& step) {
    // torch.sign: 0 for a NaN as for a zero.
    const float sign = static_cast<float>(grad > 0.0f) - static_cast<float>(grad < 0.0f);
    const float lower = x - eps, upper = x + eps;
    float y = x_adv + step.alpha * sign;
    // Written so that a NaN in y fails the comparison and stays; torch.maximum and clamp hand NaNs on as well.
    y = y < step.low ? step.low : y;
    y = y > step.high ? step.high : y;
    y = y < lower ? lower : y;
    y = y > upper ? upper : y;
    return lower == lower ? y : lower;  // a NaN in x or eps
}

MIMIR_MULTIVERSION
void step_range(const float* x_adv, const float* grad, const float* x, float eps, float* out, std::int64_t n,
                Step step) {
#pragma omp simd  // in place or disjoint: no element needs another one
    for (std::int64_t i = 0; i < n; ++i) out[i] = updated(x_adv[i], grad[i], x[i], eps, step);
}

MIMIR_MULTIVERSION
void step_range_eps(const float* x_adv, const float* grad, const float* x, const float* eps, float* out, std::int64_t n,
                    Step step) {
#pragma omp simd  // in place or disjoint: no element needs another one
    for (std::int64_t i = 0; i < n; ++i) out[i] = updated(x_adv[i], grad[i], x[i], eps[i], step);
}

}  // namespace

// eps has `num_eps` values; element i uses number (i / inner) % num_eps. `out` may be `x_adv`.
void linf_step(Address x_adv_address, Address grad_address, Address x_address, Address eps_address, Address out_address,
               std::int64_t n, std::int64_t num_eps, std::int64_t inner, float alpha, float low, float high,
               int threads) {
    const auto* x_adv = pointer<const float>(x_adv_address);
    const auto* grad = pointer<const float>(grad_address);
    const auto* x = pointer<const float>(x_address);
    const auto* eps = pointer<const float>(eps_address);
    auto* out = pointer<float>(out_address);
    const Step step{alpha, low, high};
    parallel_for(n, 1 << 15, threads, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t i = begin;
        while (i < end) {
            // The longest run that needs no division inside: one value of eps (inner > 1), or one round of all values.
            const std::int64_t run = num_eps == 1 ? end - i : inner > 1 ? inner - i % inner : num_eps - i % num_eps;
            const std::int64_t count = std::min(run, end - i), which = (i / inner) % num_eps;
            if (num_eps > 1 && inner == 1) {
                step_range_eps(x_adv + i, grad + i, x + i, eps + which, out + i, count, step);
            } else {
                step_range(x_adv + i, grad + i, x + i, eps[which], out + i, count, step);
            }
            i += count;
        }
    });
}

}  // namespace mimir
