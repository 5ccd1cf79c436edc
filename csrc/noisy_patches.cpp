// Patches straight out of an image, and beside them where an attack starts: the same with uniform noise, cut to [0, 1].
//
// Legend: B images, K of their patches wanted, P numbers in a patch (patch_reading.h). The noise of image b is the row
// of K * P numbers that random_uniform draws for its sample. Patches are done some at a time, a multiple of 4 of them,
// so that each piece begins with a whole Philox block; the noise is added while the pixels lie in the L1 cache.
#include <algorithm>

#include "functions.h"
#include "multiversion.h"
#include "parallel.h"
#include "patch_reading.h"
#include "uniform_start.h"

namespace mimir {
namespace {

struct Piece {
    std::int64_t first, last;  // patches of an image
    const std::int64_t* ids;   // of the image
    std::int64_t image;
};

template <typename T>
MIMIR_INLINE void read_piece(const T* images, const Grid& grid, const Piece& piece, float* out) {
    for (std::int64_t k = piece.first; k < piece.last; ++k) {
        const std::int64_t place = (k - piece.first) * grid.patch_length();
        read_patch_body<Scaled>(images + grid.corner(piece.image, piece.ids[k]), grid, out + place);
    }
}

template <typename T>
MIMIR_INLINE void piece_body(const T* images, const Grid& grid, const Piece& piece, const PhiloxStream& where,
                             const Ball& ball, float* clean, float* noisy) {
    const std::int64_t P = grid.patch_length(), begin = piece.first * P, end = piece.last * P;
    if (clean == nullptr) {  // in place; written apart, since compilers must see that it is one array
        read_piece(images, grid, piece, noisy);
        uniform_start(where, begin, end, noisy, ball, noisy);
    } else {
        read_piece(images, grid, piece, clean);
        uniform_start(where, begin, end, clean, ball, noisy);
    }
}

MIMIR_MULTIVERSION
void noisy_piece(const std::uint8_t* images, const Grid& grid, const Piece& piece, const PhiloxStream& where,
                 const Ball& ball, float* clean, float* noisy) {
    piece_body(images, grid, piece, where, ball, clean, noisy);
}

MIMIR_MULTIVERSION
void noisy_piece(const float* images, const Grid& grid, const Piece& piece, const PhiloxStream& where, const Ball& ball,
                 float* clean, float* noisy) {
    piece_body(images, grid, piece, where, ball, clean, noisy);
}

template <typename T>
void all_pieces(const T* images, const std::int64_t* ids, const std::int64_t* samples, const std::int64_t* steps,
                float* clean, float* noisy, std::int64_t B, std::int64_t K, const Grid& grid, std::uint64_t seed,
                std::uint32_t stream, const Ball& ball, int threads) {
    const std::int64_t P = grid.patch_length(), size = std::max<std::int64_t>(4096 / P / 4, 1) * 4;
    const std::int64_t pieces = (K + size - 1) / size;
    parallel_for(B * pieces, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t b = i / pieces, first = i % pieces * size, place = (b * K + first) * P;
            const PhiloxStream where{seed, static_cast<std::uint32_t>(samples[b]),
                                     static_cast<std::uint32_t>(steps[b]), stream};
            const Piece piece{first, std::min(first + size, K), ids + b * K, b};
            noisy_piece(images, grid, piece, where, ball, clean == nullptr ? nullptr : clean + place, noisy + place);
        }
    });
}

}  // namespace

// clean and noisy (B, K, P) float from uint8 or float images; clean: 0 if not wanted.
void noisy_patches(Address images, Address ids_address, Address samples_address, Address steps_address,
                   Address clean_address, Address noisy_address, std::int64_t B, std::int64_t K, std::int64_t channels,
                   std::int64_t patch_size, std::int64_t columns, std::array<std::int64_t, 4> stride, bool is_uint8,
                   std::uint64_t seed, std::uint32_t stream, float eps, int threads) {
    const Grid grid{channels, patch_size, columns, stride};
    const Ball ball{eps, 0.0f, 1.0f};
    const auto *ids = pointer<const std::int64_t>(ids_address), *samples = pointer<const std::int64_t>(samples_address),
               *steps = pointer<const std::int64_t>(steps_address);
    auto *clean = pointer<float>(clean_address), *noisy = pointer<float>(noisy_address);
    if (is_uint8) {
        all_pieces(pointer<const std::uint8_t>(images), ids, samples, steps, clean, noisy, B, K, grid, seed, stream,
                   ball, threads);
    } else {
        all_pieces(pointer<const float>(images), ids, samples, steps, clean, noisy, B, K, grid, seed, stream, ball,
                   threads);
    }
}

}  // namespace mimir
