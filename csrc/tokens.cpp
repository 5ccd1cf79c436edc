// Rows picked by ids and put back: memory moved row by row instead of element by element.
//
// Legend: B images, N patches, K kept ones, D numbers in a row. Rows are dense; strides are in bytes where they are
// `*_stride`, so that a slice such as x[:, 1:] needs no copy. The ids of an image are distinct (see check_ids).
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "functions.h"
#include "multiversion.h"
#include "numbers.h"
#include "parallel.h"

namespace mimir {
namespace {

constexpr std::int64_t GRAIN_BYTES = 1 << 16;

}  // namespace

// "outside" if an id is not in [0, N), "repeated" if an image names a patch twice, "" if all is well.
std::string check_ids(Address ids_address, std::int64_t B, std::int64_t K, std::int64_t N, int) {
    const auto* ids = pointer<const std::int64_t>(ids_address);
    std::vector<std::int64_t> last_image(N, -1);
    for (std::int64_t b = 0; b < B; ++b) {
        for (std::int64_t k = 0; k < K; ++k) {
            const std::int64_t id = ids[b * K + k];
            if (id < 0 || id >= N) return "outside";
            if (last_image[id] == b) return "repeated";
            last_image[id] = b;
        }
    }
    return "";
}

namespace {

// inverse[n] = k where ids[k] = n, else -1.
void invert(const std::int64_t* ids, std::int64_t K, std::vector<std::int64_t>& inverse) {
    std::fill(inverse.begin(), inverse.end(), -1);
    for (std::int64_t k = 0; k < K; ++k) inverse[ids[k]] = k;
}

}  // namespace

// out[b, ids[b, k]] = y[b, k], zero elsewhere: the adjoint of a gather. Each output row is written once.
void place_patches(Address y_address, Address ids_address, Address out_address, std::int64_t B, std::int64_t K,
                   std::int64_t N, std::int64_t row_bytes, int threads) {
    const auto* y = pointer<const char>(y_address);
    const auto* ids = pointer<const std::int64_t>(ids_address);
    auto* out = pointer<char>(out_address);
    const std::int64_t grain = GRAIN_BYTES / std::max<std::int64_t>(N * row_bytes, 1) + 1;
    parallel_for(B, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::int64_t> inverse(N);
        for (std::int64_t b = begin; b < end; ++b) {
            invert(ids + b * K, K, inverse);
            for (std::int64_t n = 0; n < N; ++n) {
                char* row = out + (b * N + n) * row_bytes;
                if (inverse[n] < 0) {
                    std::memset(row, 0, row_bytes);
                } else {
                    std::memcpy(row, y + (b * K + inverse[n]) * row_bytes, row_bytes);
                }
            }
        }
    });
}

namespace {

MIMIR_MULTIVERSION
void add_rows(const float* a, const float* b, float* out, std::int64_t D) {
    for (std::int64_t d = 0; d < D; ++d) out[d] = a[d] + b[d];
}

MIMIR_MULTIVERSION
void add_rows(const Bf16* a, const Bf16* b, Bf16* out, std::int64_t D) {
    for (std::int64_t d = 0; d < D; ++d) store(load(a + d) + load(b + d), out + d);
}

template <typename Number>
void scatter_numbers(Address visible_address, Address ids_address, Address mask_token_address,
                     Address pos_embed_address, Address out_address, std::int64_t B, std::int64_t K, std::int64_t N,
                     std::int64_t D, std::int64_t batch_stride, std::int64_t row_stride, int threads) {
    const auto* visible = pointer<const char>(visible_address);
    const auto* ids = pointer<const std::int64_t>(ids_address);
    const auto* mask_token = pointer<const Number>(mask_token_address);
    const auto* pos_embed = pointer<const Number>(pos_embed_address);
    auto* out = pointer<Number>(out_address);
    const std::int64_t grain = GRAIN_BYTES / std::max<std::int64_t>(sizeof(Number) * N * D, 1) + 1;
    parallel_for(B, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::int64_t> inverse(N);
        for (std::int64_t b = begin; b < end; ++b) {
            invert(ids + b * K, K, inverse);
            for (std::int64_t n = 0; n < N; ++n) {
                const char* row = visible + b * batch_stride + inverse[n] * row_stride;
                const Number* token = inverse[n] < 0 ? mask_token : reinterpret_cast<const Number*>(row);
                add_rows(token, pos_embed + n * D, out + (b * N + n) * D, D);
            }
        }
    });
}

}  // namespace

// out[b, n] = (visible[b, k] where ids[b, k] = n, else mask_token) + pos_embed[n], all float or all bfloat16.
void scatter_patches(Address visible, Address ids, Address mask_token, Address pos_embed, Address out, std::int64_t B,
                     std::int64_t K, std::int64_t N, std::int64_t D, std::int64_t batch_stride, std::int64_t row_stride,
                     bool is_bf16, int threads) {
    const auto scatter = is_bf16 ? &scatter_numbers<Bf16> : &scatter_numbers<float>;
    scatter(visible, ids, mask_token, pos_embed, out, B, K, N, D, batch_stride, row_stride, threads);
}

namespace {

template <typename Number>
void add_positions_of(Address tokens_address, Address ids_address, Address positions_address, Address prefix_address,
                      Address out_address, std::int64_t B, std::int64_t T, std::int64_t num_prefix, std::int64_t D,
                      std::int64_t batch_stride, std::int64_t row_stride, int threads) {
    const auto* tokens = pointer<const char>(tokens_address);
    const auto* ids = pointer<const std::int64_t>(ids_address);
    const auto* positions = pointer<const Number>(positions_address);
    const auto* prefix = pointer<const Number>(prefix_address);
    auto* out = pointer<Number>(out_address);
    parallel_for(B * T, GRAIN_BYTES / std::max<std::int64_t>(sizeof(Number) * D, 1) + 1, threads,
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t i = begin; i < end; ++i) {
                         const std::int64_t b = i / T, t = i % T;
                         const char* row = tokens + b * batch_stride + (t - num_prefix) * row_stride;
                         const Number* token =
                             t < num_prefix ? prefix + t * D : reinterpret_cast<const Number*>(row);
                         add_rows(token, positions + (ids == nullptr ? t : ids[i]) * D, out + i * D, D);
                     }
                 });
}

}  // namespace

// out[b, t] = (prefix[t], then tokens[b, t - num_prefix]) + positions[ids[b, t]], all float or all bfloat16; without
// ids row t gets position t.
void add_positions(Address tokens, Address ids, Address positions, Address prefix, Address out, std::int64_t B,
                   std::int64_t T, std::int64_t num_prefix, std::int64_t D, std::int64_t batch_stride,
                   std::int64_t row_stride, bool is_bf16, int threads) {
    const auto add = is_bf16 ? &add_positions_of<Bf16> : &add_positions_of<float>;
    add(tokens, ids, positions, prefix, out, B, T, num_prefix, D, batch_stride, row_stride, threads);
}

}  // namespace mimir
