// The reconstruction error of masked patches and its gradient, straight from the pixels: no target is ever written.
//
// Legend: B images, M masked patches of P numbers (patch_reading.h), prediction and gradient (B, M, P) dense. A patch
// lies in the L1 cache from its pixels to its part of the gradient; each leaves one float64 number, and these are added
// in the order of the patches, so neither the threads nor the cuts between them change a bit.
#include <cmath>
#include <vector>

#include "functions.h"
#include "multiversion.h"
#include "numbers.h"
#include "parallel.h"
#include "patch_reading.h"

namespace mimir {
namespace {

struct Loss {
    bool normalized, absolute;
    float unit;   // of a stored pixel
    float eps;    // under the root of the variance
    float slope;  // of the whole loss in a number's squared (absolute) error
};

// y = (x - mean) * factor is what a patch should have been.
struct Target {
    float mean, factor;
};

// Zero mean and unit unbiased variance, eps under the root, or just the unit. Two passes over the L1 cache.
MIMIR_INLINE Target target_of(const float* pixels, std::int64_t P, const Loss& loss) {
    if (!loss.normalized) return {0.0f, loss.unit};
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < P; ++i) sum += pixels[i];
    const float mean = sum / static_cast<float>(P);
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < P; ++i) squares += (pixels[i] - mean) * (pixels[i] - mean);
    const float variance = squares / static_cast<float>(P - 1) + loss.eps / (loss.unit * loss.unit);
    return {mean, 1.0f / std::sqrt(variance)};
}

template <bool kAbsolute, bool kGradient, typename Number>
MIMIR_INLINE float error_of(const float* pixels, std::int64_t P, const Target& target, float slope,
                            const Number* __restrict prediction, Number* __restrict gradient) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < P; ++i) {
        const float difference = load(prediction + i) - (pixels[i] - target.mean) * target.factor;
        const float sign = static_cast<float>(difference > 0.0f) - static_cast<float>(difference < 0.0f);
        sum += kAbsolute ? std::fabs(difference) : difference * difference;
        if (kGradient) store((kAbsolute ? sign : 2.0f * difference) * slope, gradient + i);
    }
    return sum;
}

template <typename Pixel, typename Number>
MIMIR_INLINE double patch_loss_body(const Pixel* corner, const Grid& grid, const Loss& loss, float* pixels,
                                    const Number* prediction, Number* gradient) {
    const std::int64_t P = grid.patch_length();
    read_patch_body<Stored>(corner, grid, pixels);
    const Target target = target_of(pixels, P, loss);
    if (loss.absolute) {
        return gradient == nullptr ? error_of<true, false>(pixels, P, target, loss.slope, prediction, gradient)
                                   : error_of<true, true>(pixels, P, target, loss.slope, prediction, gradient);
    }
    return gradient == nullptr ? error_of<false, false>(pixels, P, target, loss.slope, prediction, gradient)
                               : error_of<false, true>(pixels, P, target, loss.slope, prediction, gradient);
}

// Templates have no clones: one function for each pair of pixels and predictions.
MIMIR_MULTIVERSION
double patch_loss(const std::uint8_t* corner, const Grid& grid, const Loss& loss, float* pixels,
                  const float* prediction, float* gradient) {
    return patch_loss_body(corner, grid, loss, pixels, prediction, gradient);
}

MIMIR_MULTIVERSION
double patch_loss(const std::uint8_t* corner, const Grid& grid, const Loss& loss, float* pixels, const Bf16* prediction,
                  Bf16* gradient) {
    return patch_loss_body(corner, grid, loss, pixels, prediction, gradient);
}

MIMIR_MULTIVERSION
double patch_loss(const float* corner, const Grid& grid, const Loss& loss, float* pixels, const float* prediction,
                  float* gradient) {
    return patch_loss_body(corner, grid, loss, pixels, prediction, gradient);
}

MIMIR_MULTIVERSION
double patch_loss(const float* corner, const Grid& grid, const Loss& loss, float* pixels, const Bf16* prediction,
                  Bf16* gradient) {
    return patch_loss_body(corner, grid, loss, pixels, prediction, gradient);
}

template <typename Pixel, typename Number>
double sum_over_patches(Address images_address, Address ids_address, Address prediction_address,
                        Address gradient_address, std::int64_t B, std::int64_t M, const Grid& grid, const Loss& loss,
                        int threads) {
    const auto* images = pointer<const Pixel>(images_address);
    const auto* ids = pointer<const std::int64_t>(ids_address);
    const auto* prediction = pointer<const Number>(prediction_address);
    auto* gradient = pointer<Number>(gradient_address);
    const std::int64_t P = grid.patch_length();
    std::vector<double> errors(B * M);
    parallel_for(B * M, 16384 / P + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> pixels(P);
        for (std::int64_t i = begin; i < end; ++i) {
            errors[i] = patch_loss(images + grid.corner(i / M, ids[i]), grid, loss, pixels.data(), prediction + i * P,
                                   gradient == nullptr ? nullptr : gradient + i * P);
        }
    });
    double total = 0.0;
    for (const double error : errors) total += error;
    return total;
}

}  // namespace

// The sum of squared (or absolute) errors; `gradient` is 0 where none is wanted.
double masked_loss(Address images, Address ids, Address prediction, Address gradient, std::int64_t B, std::int64_t M,
                   std::int64_t channels, std::int64_t patch_size, std::int64_t columns,
                   std::array<std::int64_t, 4> stride, bool is_uint8, bool is_bf16, bool normalized, bool absolute,
                   float eps, float slope, int threads) {
    const Grid grid{channels, patch_size, columns, stride};
    const Loss loss{normalized, absolute, is_uint8 ? 1.0f / 255.0f : 1.0f, eps, slope};
    const auto sum = is_uint8 ? (is_bf16 ? &sum_over_patches<std::uint8_t, Bf16>
                                         : &sum_over_patches<std::uint8_t, float>)
                              : (is_bf16 ? &sum_over_patches<float, Bf16> : &sum_over_patches<float, float>);
    return sum(images, ids, prediction, gradient, B, M, grid, loss, threads);
}

}  // namespace mimir
