// Patches straight out of an image: only the wanted pixels are read, converted, reordered and (on demand) normalised.
//
// Legend: B images, K of their patches wanted, P numbers in a patch (patch_reading.h).
#include <cmath>

#include "functions.h"
#include "multiversion.h"
#include "parallel.h"
#include "patch_reading.h"

namespace mimir {
namespace {

MIMIR_MULTIVERSION
void read_patch(const float* corner, const Grid& grid, float* out) { read_patch_body<Scaled>(corner, grid, out); }

MIMIR_MULTIVERSION
void read_patch(const std::uint8_t* corner, const Grid& grid, float* out) { read_patch_body<Scaled>(corner, grid, out); }

// To zero mean and unit unbiased variance, eps under the root. Two passes over a patch that lies in the L1 cache.
MIMIR_MULTIVERSION
void normalize(float* patch, std::int64_t P, float eps) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < P; ++i) sum += patch[i];
    const float mean = sum / static_cast<float>(P);
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < P; ++i) squares += (patch[i] - mean) * (patch[i] - mean);
    const float deviation = std::sqrt(squares / static_cast<float>(P - 1) + eps);
    for (std::int64_t i = 0; i < P; ++i) patch[i] = (patch[i] - mean) / deviation;
}

template <typename T>
void gather(const T* images, const std::int64_t* ids, float* out, std::int64_t B, std::int64_t K, const Grid& grid,
            bool normalized, float eps, int threads) {
    const std::int64_t P = grid.patch_length();
    parallel_for(B * K, 16384 / P + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            read_patch(images + grid.corner(i / K, ids[i]), grid, out + i * P);
            if (normalized) normalize(out + i * P, P, eps);
        }
    });
}

}  // namespace

// out (B, K, P) float from uint8 or float images.
void patchify_gather(Address images, Address ids_address, Address out_address, std::int64_t B, std::int64_t K,
                     std::int64_t channels, std::int64_t patch_size, std::int64_t columns,
                     std::array<std::int64_t, 4> stride, bool is_uint8, bool normalized, float eps, int threads) {
    const Grid grid{channels, patch_size, columns, stride};
    const auto* ids = pointer<const std::int64_t>(ids_address);
    auto* out = pointer<float>(out_address);
    if (is_uint8) {
        gather(pointer<const std::uint8_t>(images), ids, out, B, K, grid, normalized, eps, threads);
    } else {
        gather(pointer<const float>(images), ids, out, B, K, grid, normalized, eps, threads);
    }
}

// images (B, C, H, W), contiguous and zeroed: the patches in their places. The adjoint of patchify_gather.
void unpatchify_visible(Address patches_address, Address ids_address, Address images_address, std::int64_t B,
                        std::int64_t K, std::int64_t channels, std::int64_t patch_size, std::int64_t columns,
                        std::array<std::int64_t, 4> stride, int threads) {
    const Grid grid{channels, patch_size, columns, stride};
    const auto* patches = pointer<const float>(patches_address);
    const auto* ids = pointer<const std::int64_t>(ids_address);
    auto* images = pointer<float>(images_address);
    const std::int64_t P = grid.patch_length();
    parallel_for(B * K, 16384 / P + 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const float* patch = patches + i * P;
            float* corner = images + grid.corner(i / K, ids[i]);
            for (std::int64_t c = 0; c < channels; ++c) {
                for (std::int64_t y = 0; y < patch_size; ++y) {
                    float* row = corner + c * stride[1] + y * stride[2];
                    const float* source = patch + y * patch_size * channels + c;
                    for (std::int64_t x = 0; x < patch_size; ++x) row[x] = source[x * channels];
                }
            }
        }
    });
}

}  // namespace mimir
