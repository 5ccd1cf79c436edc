// Where a patch lies in an image, and its pixels as float in the order (row, column, channel).
//
// Legend: images of C channels, patches of p x p pixels in a grid `columns` wide; a patch is P = p * p * C numbers.
// Image strides are in elements, any memory format.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "multiversion.h"

namespace mimir {

struct Grid {
    std::int64_t channels, patch_size, columns;
    std::array<std::int64_t, 4> stride;  // of B, C, H, W

    std::int64_t patch_length() const { return patch_size * patch_size * channels; }
    std::int64_t corner(std::int64_t b, std::int64_t patch) const {
        return b * stride[0] + patch / columns * patch_size * stride[2] + patch % columns * patch_size * stride[3];
    }
};

// What becomes of a pixel: a number in [0, 1], or the number as it is stored.
struct Scaled {
    MIMIR_INLINE static float pixel(float value) { return value; }
    MIMIR_INLINE static float pixel(std::uint8_t value) { return static_cast<float>(value) / 255.0f; }
};

struct Stored {
    template <typename T>
    MIMIR_INLINE static float pixel(T value) {
        return static_cast<float>(value);
    }
};

#if defined(__GNUC__) && !defined(__clang__)
#define MIMIR_INTERLEAVES 1
using Bytes = std::uint8_t __attribute__((vector_size(16)));

// out[3 * i + c] = channel c of pixel i, for 16 pixels: byte shuffles, where compilers see single bytes to be moved.
MIMIR_INLINE void interleave(const std::uint8_t* red, const std::uint8_t* green, const std::uint8_t* blue,
                             std::uint8_t* out) {
    Bytes r, g, b;
    std::memcpy(&r, red, 16);
    std::memcpy(&g, green, 16);
    std::memcpy(&b, blue, 16);
    // Lane j of piece k is number 16k + j: channel (16k + j) % 3 of pixel (16k + j) / 3; 16 and above is the other one.
    const Bytes first[3] = {{0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5},
                            {21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26},
                            {0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0}};
    const Bytes second[3] = {{0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15},
                             {0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15},
                             {26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31}};
    for (int k = 0; k < 3; ++k) {
        const Bytes piece = __builtin_shuffle(__builtin_shuffle(r, g, first[k]), b, second[k]);
        std::memcpy(out + 16 * k, &piece, 16);
    }
}
#endif

// One row of a patch. Written out for the usual cases so that the strides are constants to the compiler.
template <typename As, typename T>
MIMIR_INLINE void read_row(const T* row, const Grid& grid, float* __restrict out) {
    const std::int64_t p = grid.patch_size, C = grid.channels, step_c = grid.stride[1], step_w = grid.stride[3];
    if (step_c == 1 && (step_w == C || p == 1)) {  // channels last: already in order
        for (std::int64_t i = 0; i < p * C; ++i) out[i] = As::pixel(row[i]);
    } else if (step_w == 1 && C == 3) {
        const T *red = row, *green = row + step_c, *blue = row + 2 * step_c;
        std::int64_t i = 0;
#ifdef MIMIR_INTERLEAVES
        if constexpr (std::is_same_v<T, std::uint8_t>) {
            for (; i + 16 <= p; i += 16) {
                std::uint8_t bytes[48];
                interleave(red + i, green + i, blue + i, bytes);
                for (int j = 0; j < 48; ++j) out[3 * i + j] = As::pixel(bytes[j]);
            }
        }
#endif
        for (; i < p; ++i) {
            out[3 * i] = As::pixel(red[i]);
            out[3 * i + 1] = As::pixel(green[i]);
            out[3 * i + 2] = As::pixel(blue[i]);
        }
    } else {
        for (std::int64_t i = 0; i < p; ++i) {
            for (std::int64_t c = 0; c < C; ++c) out[i * C + c] = As::pixel(row[c * step_c + i * step_w]);
        }
    }
}

template <typename As, typename T>
MIMIR_INLINE void read_patch_body(const T* corner, const Grid& grid, float* __restrict out) {
    for (std::int64_t y = 0; y < grid.patch_size; ++y) {
        read_row<As>(corner + y * grid.stride[2], grid, out + y * grid.patch_size * grid.channels);
    }
}

}  // namespace mimir
