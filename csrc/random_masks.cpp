// Random masks: Philox keys, then a selection of the K smallest instead of a full sort of all N.
//
// Key of patch n = (its 32 random bits, n), so keys are distinct and the choice is the same on every device.
#include <algorithm>
#include <vector>

#include "functions.h"
#include "multiversion.h"
#include "parallel.h"
#include "philox.h"

namespace mimir {
namespace {

MIMIR_MULTIVERSION
void fill_keys(PhiloxStream where, std::int64_t num_patches, std::uint64_t* keys) {
    std::uint32_t words[PHILOX_WORDS];
    for (std::int64_t first = 0; first < num_patches; first += PHILOX_WORDS) {
        philox_words(where, static_cast<std::uint32_t>(first / 4), words);
        const std::int64_t count = std::min<std::int64_t>(PHILOX_WORDS, num_patches - first);
        for (std::int64_t i = 0; i < count; ++i) {
            keys[first + i] = static_cast<std::uint64_t>(words[i]) << 16 | static_cast<std::uint64_t>(first + i);
        }
    }
}

}  // namespace

// keep (B, K): ascending, or in the order of the keys if `shuffled`; masked (B, N - K): ascending.
void random_masks(Address samples_address, Address steps_address, Address keep_address, Address masked_address,
                  std::int64_t num_samples, std::int64_t num_patches, std::int64_t num_keep, std::uint64_t seed,
                  std::uint32_t stream, bool shuffled, int threads) {
    const auto* samples = pointer<const std::int64_t>(samples_address);
    const auto* steps = pointer<const std::int64_t>(steps_address);
    const std::int64_t num_masked = num_patches - num_keep;
    parallel_for(num_samples, 8, threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint64_t> keys(num_patches), ordered(num_patches);
        for (std::int64_t b = begin; b < end; ++b) {
            auto* keep = pointer<std::int64_t>(keep_address) + b * num_keep;
            auto* masked = pointer<std::int64_t>(masked_address) + b * num_masked;
            const PhiloxStream where{seed, static_cast<std::uint32_t>(samples[b]), static_cast<std::uint32_t>(steps[b]),
                                     stream};
            fill_keys(where, num_patches, keys.data());
            ordered = keys;
            const auto last_kept = ordered.begin() + (num_keep - 1);
            std::nth_element(ordered.begin(), last_kept, ordered.end());
            const std::uint64_t threshold = *last_kept;
            if (shuffled) {
                std::sort(ordered.begin(), last_kept);
                for (std::int64_t k = 0; k < num_keep; ++k) keep[k] = static_cast<std::int64_t>(ordered[k] & 0xFFFF);
            }
            for (std::int64_t n = 0; n < num_patches; ++n) {
                if (keys[n] > threshold) {
                    *masked++ = n;
                } else if (!shuffled) {
                    *keep++ = n;
                }
            }
        }
    });
}

}  // namespace mimir
