// Counter-based uniform numbers, and the random start of an attack made of them (see philox.h).
//
// The work is cut into blocks of PHILOX_WORDS numbers of one sample; each block stands alone, so neither the threads
// nor the batch change a number.
#include <algorithm>

#include "functions.h"
#include "multiversion.h"
#include "parallel.h"
#include "philox.h"
#include "uniform_start.h"

namespace mimir {
namespace {

MIMIR_MULTIVERSION
void uniform_range(PhiloxStream where, std::int64_t begin, std::int64_t end, float* out) {
    std::uint32_t words[PHILOX_WORDS];
    for (std::int64_t first = begin; first < end; first += PHILOX_WORDS) {
        philox_words(where, static_cast<std::uint32_t>(first / 4), words);
        const std::int64_t count = std::min<std::int64_t>(PHILOX_WORDS, end - first);
        for (std::int64_t i = 0; i < count; ++i) out[first + i] = uniform_from_bits(words[i]);
    }
}

MIMIR_MULTIVERSION
void start_range(PhiloxStream where, std::int64_t begin, std::int64_t end, const float* x, Ball ball, float* out) {
    uniform_start(where, begin, end, x + begin, ball, out + begin);
}

constexpr std::int64_t PIECE = 128 * PHILOX_WORDS;

// Calls body(stream of the sample, sample's row, begin, end) for pieces of a (num_samples, num) array.
template <typename Body>
void for_each_piece(Address samples_address, Address steps_address, std::int64_t num_samples, std::int64_t num,
                    std::uint64_t seed, std::uint32_t stream, int threads, const Body& body) {
    const auto* samples = pointer<const std::int64_t>(samples_address);
    const auto* steps = pointer<const std::int64_t>(steps_address);
    const std::int64_t pieces = (num + PIECE - 1) / PIECE;
    parallel_for(num_samples * pieces, 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t row = i / pieces, begin = i % pieces * PIECE;
            const PhiloxStream where{seed, static_cast<std::uint32_t>(samples[row]),
                                     static_cast<std::uint32_t>(steps[row]), stream};
            body(where, row, begin, std::min(begin + PIECE, num));
        }
    });
}

}  // namespace

void random_uniform(Address samples, Address steps, Address out_address, std::int64_t num_samples, std::int64_t num,
                    std::uint64_t seed, std::uint32_t stream, int threads) {
    auto* out = pointer<float>(out_address);
    for_each_piece(samples, steps, num_samples, num, seed, stream, threads,
                   [&](const PhiloxStream& where, std::int64_t row, std::int64_t begin, std::int64_t end) {
                       uniform_range(where, begin, end, out + row * num);
                   });
}

void random_start_linf(Address x_address, Address samples, Address steps, Address out_address, std::int64_t num_samples,
                       std::int64_t num, std::uint64_t seed, std::uint32_t stream, float eps, float low, float high,
                       int threads) {
    const auto* x = pointer<const float>(x_address);
    auto* out = pointer<float>(out_address);
    const Ball ball{eps, low, high};
    for_each_piece(samples, steps, num_samples, num, seed, stream, threads,
                   [&](const PhiloxStream& where, std::int64_t row, std::int64_t begin, std::int64_t end) {
                       start_range(where, begin, end, x + row * num, ball, out + row * num);
                   });
}

}  // namespace mimir
