// Crop, bicubic resize with antialiasing, window and mirror of uint8 images, to planar uint8.
//
// Equal to PIL's Image.resize(BICUBIC, box=…) and to mimir_fast.ops.crop_resize.crop_resize_reference bit for bit:
// weights in double precision, rounded to 22 fractional bits; first along the rows, the result rounded to uint8, then
// along the columns (Pillow's Resample.c does just so). PIL multiplies one pixel at a time; here 16 numbers are worked
// on at once: four rows of RGB (padded to four channels), or sixteen rows of a grey image.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "functions.h"
#include "multiversion.h"
#include "parallel.h"
#include "processor.h"

namespace mimir {
namespace {

constexpr int kBits = 22;   // 32 - 8 for a pixel - 2, since the negative lobes make sums of weights exceed 1
constexpr int kLanes = 16;  // numbers worked on at once
constexpr std::int32_t kHalf = 1 << (kBits - 1);

// One row of the plan; the columns of mimir_fast.ops.crop_resize.PLAN.
struct Image {
    std::int64_t offset, height, width, box[4], size[2], anchor[2], mirror;
};

// Which pixels of one axis make each output pixel, and how much of each.
struct Taps {
    std::vector<int> first, count, weights;
    int most = 0;
};

double bicubic(double x) {
    x = std::fabs(x);
    if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

// Output i of `side` is pixel i + anchor of the resized axis (from the far end when mirrored); none outside of it.
void find_taps(int length, int start, int extent, int resized, int anchor, bool mirror, int side, Taps& taps,
               std::vector<double>& raw) {
    const double scale = static_cast<double>(extent) / resized, filter_scale = std::max(scale, 1.0);
    const double support = 2.0 * filter_scale, narrower = 1.0 / filter_scale;
    taps.most = static_cast<int>(std::ceil(support)) * 2 + 1;
    taps.first.assign(side, 0);
    taps.count.assign(side, 0);
    taps.weights.assign(static_cast<std::size_t>(side) * taps.most, 0);
    raw.resize(taps.most);
    for (int i = 0; i < side; ++i) {
        const int place = (mirror ? side - 1 - i : i) + anchor;
        if (place < 0 || place >= resized) continue;
        const double center = start + (place + 0.5) * scale;
        const int first = std::max(static_cast<int>(center - support + 0.5), 0);
        const int count = std::min(static_cast<int>(center + support + 0.5), length) - first;
        double total = 0.0;
        for (int k = 0; k < count; ++k) total += raw[k] = bicubic((k + first - center + 0.5) * narrower);
        int* weights = &taps.weights[static_cast<std::size_t>(i) * taps.most];
        for (int k = 0; k < count; ++k) {
            const double weight = (total != 0.0 ? raw[k] / total : raw[k]) * (1 << kBits);
            weights[k] = static_cast<int>(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        taps.first[i] = first;
        taps.count[i] = count;
    }
}

struct Scratch {
    Taps rows, columns;
    std::vector<double> raw;
    std::vector<std::int32_t> spread;
    std::vector<std::uint8_t> between;
};

using Kernel = void (*)(const std::uint8_t* image, const Image& plan, int height, int width, Scratch& scratch,
                        std::uint8_t* out);

namespace base {
struct Lanes {
    std::int32_t at[kLanes];
};
MIMIR_INLINE Lanes halves() {
    Lanes sums;
    for (int i = 0; i < kLanes; ++i) sums.at[i] = kHalf;
    return sums;
}
template <typename Number>
MIMIR_INLINE Lanes widened(const Number* from) {
    Lanes lanes;
    for (int i = 0; i < kLanes; ++i) lanes.at[i] = from[i];
    return lanes;
}
MIMIR_INLINE Lanes load(const std::int32_t* from) { return widened(from); }
MIMIR_INLINE Lanes widen(const std::uint8_t* from) { return widened(from); }
MIMIR_INLINE Lanes multiply_add(Lanes pixels, std::int32_t weight, Lanes sums) {
    for (int i = 0; i < kLanes; ++i) sums.at[i] += pixels.at[i] * weight;
    return sums;
}
MIMIR_INLINE void store_rounded(Lanes sums, std::uint8_t* to) {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<std::uint8_t>(std::clamp(sums.at[i] >> kBits, 0, 255));
}
MIMIR_INLINE void widen4(const std::uint8_t* from, std::int32_t* to) {
    for (int i = 0; i < 4; ++i) to[i] = from[i];
}
MIMIR_INLINE void unzip4(std::uint8_t* bytes) {
    std::uint8_t zipped[kLanes];
    std::memcpy(zipped, bytes, kLanes);
    for (int i = 0; i < kLanes; ++i) bytes[i] = zipped[i % 4 * 4 + i / 4];
}
#include "crop_resize_kernel.h"
}  // namespace base

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 12)
#define MIMIR_X86
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 of its own intrinsics
#endif
// What the two instruction sets below share; each compiles its own.
#define MIMIR_X86_BYTES                                                                                     \
    MIMIR_INLINE void widen4(const std::uint8_t* from, std::int32_t* to) {                                  \
        int four;                                                                                           \
        std::memcpy(&four, from, 4);                                                                        \
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));       \
    }                                                                                                       \
    MIMIR_INLINE void unzip4(std::uint8_t* bytes) {                                                         \
        auto* whole = reinterpret_cast<__m128i*>(bytes);                                                    \
        const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);          \
        _mm_storeu_si128(whole, _mm_shuffle_epi8(_mm_loadu_si128(whole), order));                           \
    }
MIMIR_TARGET(MIMIR_V3)
namespace v3 {
struct Lanes {
    __m256i low, high;
};
MIMIR_INLINE Lanes halves() { return {_mm256_set1_epi32(kHalf), _mm256_set1_epi32(kHalf)}; }
MIMIR_INLINE Lanes load(const std::int32_t* from) {
    const auto* both = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(both), _mm256_loadu_si256(both + 1)};
}
MIMIR_INLINE Lanes widen(const std::uint8_t* from) {
    const auto* both = reinterpret_cast<const __m128i*>(from);
    const __m128i bytes = _mm_loadu_si128(both);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
MIMIR_INLINE Lanes multiply_add(Lanes pixels, std::int32_t weight, Lanes sums) {
    const __m256i weights = _mm256_set1_epi32(weight);
    return {_mm256_add_epi32(sums.low, _mm256_mullo_epi32(pixels.low, weights)),
            _mm256_add_epi32(sums.high, _mm256_mullo_epi32(pixels.high, weights))};
}
MIMIR_INLINE void store_rounded(Lanes sums, std::uint8_t* to) {  // packing saturates, in each half of a register
    const __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(sums.low, kBits), _mm256_srai_epi32(sums.high, kBits));
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
}
MIMIR_X86_BYTES
#include "crop_resize_kernel.h"
}  // namespace v3
MIMIR_END_TARGET
MIMIR_TARGET(MIMIR_V4)
namespace v4 {
using Lanes = __m512i;
MIMIR_INLINE Lanes halves() { return _mm512_set1_epi32(kHalf); }
MIMIR_INLINE Lanes load(const std::int32_t* from) { return _mm512_loadu_si512(from); }
MIMIR_INLINE Lanes widen(const std::uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
MIMIR_INLINE Lanes multiply_add(Lanes pixels, std::int32_t weight, Lanes sums) {
    return _mm512_add_epi32(sums, _mm512_mullo_epi32(pixels, _mm512_set1_epi32(weight)));
}
MIMIR_INLINE void store_rounded(Lanes sums, std::uint8_t* to) {
    const Lanes positive = _mm512_max_epi32(_mm512_srai_epi32(sums, kBits), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(positive));
}
MIMIR_X86_BYTES
#include "crop_resize_kernel.h"
}  // namespace v4
MIMIR_END_TARGET
#endif

Kernel choose_kernel(std::int64_t channels) {
    const bool grey = channels == 1;
#ifdef MIMIR_X86
    if (unit() >= Unit::avx512) return grey ? v4::crop_resize_one<1, 1> : v4::crop_resize_one<3, 4>;
    if (unit() >= Unit::avx2) return grey ? v3::crop_resize_one<1, 1> : v3::crop_resize_one<3, 4>;
#endif
    return grey ? base::crop_resize_one<1, 1> : base::crop_resize_one<3, 4>;
}

}  // namespace

// `plan` is (batch, 12) int64, `out` (batch, channels, height, width). The caller has checked that all lies inside.
void crop_resize(Address pixels_address, Address plan_address, Address out_address, std::int64_t batch,
                 std::int64_t height, std::int64_t width, std::int64_t channels, int threads) {
    const auto* pixels = pointer<const std::uint8_t>(pixels_address);
    const auto* plan = pointer<const Image>(plan_address);
    auto* out = pointer<std::uint8_t>(out_address);
    const Kernel one = choose_kernel(channels);
    parallel_for(batch, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        Scratch scratch;
        for (std::int64_t b = begin; b < end; ++b) {
            one(pixels + plan[b].offset, plan[b], static_cast<int>(height), static_cast<int>(width), scratch,
                out + b * channels * height * width);
        }
    });
}

}  // namespace mimir
