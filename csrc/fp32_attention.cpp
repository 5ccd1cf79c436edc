// Softmax attention in float32 for short sequences, a head at a time, without a matrix of scores in memory.
//
// A head of a masked autoencoder (50 to 260 tokens of 8 to 64 numbers) fits the second-level cache whole. Its keys and
// values are copied there once; then come some queries at a time, one in each lane of two or three vectors: products
// straight from the vector registers (fp32_vectors.h), and the softmax while the scores lie near. Scores stand as
// (keys, queries), so that the sums of a softmax run down the vectors.
// Heads are independent and each is one thread's, so the number of threads does not change a bit of the result.
//
// Legend: B images, T queries, S keys, H heads of E numbers (a multiple of 8); q (B, T, H, E), k and v (B, S, H, E) with
// the heads of a token in one piece; s_j = q·k_j/√E, p = softmax(s), o = Σ p_j v_j, lse = log Σ exp s_j. W queries at a
// time. Backward: dp_j = do·v_j, ds_j = p_j (dp_j − do·o), dq = Σ ds_j k_j/√E, dk_j = Σ_t ds_j q/√E, dv_j = Σ_t p_j do.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "attention_heads.h"
#include "exponential.h"
#include "functions.h"
#include "multiversion.h"
#include "parallel.h"
#include "processor.h"
#include "scratch.h"

#ifdef MIMIR_VECTORS
namespace mimir {
namespace {

constexpr int kQueryVectors = 3;  // at most, at a time
constexpr std::int64_t kKeys = 64;  // at a time, so that what they need stays in the first-level cache
constexpr float kLog2E = 1.44269504f;

using Tokens = HeadTokens<float>;
using Problem = Heads<float>;

// Nothing here has to round as the definition does, so a multiplication and an addition may be one instruction.
MIMIR_CONTRACT
#if defined(__x86_64__)
#define MIMIR_X86
MIMIR_TARGET(MIMIR_V4)
namespace v4 {
constexpr int kLanes = 16, kRegisters = 32;
#include "fp32_vectors.h"
#include "fp32_attention_kernel.h"
}  // namespace v4
MIMIR_END_TARGET
MIMIR_TARGET(MIMIR_V3)
namespace v3 {
constexpr int kLanes = 8, kRegisters = 16;
#include "fp32_vectors.h"
#include "fp32_attention_kernel.h"
}  // namespace v3
MIMIR_END_TARGET
#endif
namespace baseline {
constexpr int kLanes = 4, kRegisters = 16;
#include "fp32_vectors.h"
#include "fp32_attention_kernel.h"
}  // namespace baseline
MIMIR_END_CONTRACT

}  // namespace

// Numbers in the widest vector in use.
int fp32_lanes(int) {
    return unit() >= Unit::avx512 ? 16 : unit() == Unit::avx2 ? 8 : 4;
}

namespace {

using Kernel = void (*)(const Problem&, std::int64_t begin, std::int64_t end);

Kernel choose(int lanes, bool backward) {
#ifdef MIMIR_X86
    if (lanes == 16) return backward ? v4::backward_heads : v4::forward_heads;
    if (lanes == 8) return backward ? v3::backward_heads : v3::forward_heads;
#endif
    return backward ? baseline::backward_heads : baseline::forward_heads;
}

}  // namespace

// strides: see attention_heads.h. E: a multiple of 8. lanes: 16, 8 or 4, at most `fp32_lanes`.
void fp32_attention(Address q, Address k, Address v, Address out, Address lse, std::int64_t B, std::int64_t T,
                    std::int64_t S, std::int64_t H, std::int64_t E, const std::vector<std::int64_t>& strides, int lanes,
                    int threads) {
    const Problem p = heads<float>(T, S, H, E, strides, q, k, v, out, lse);
    const Kernel kernel = choose(lanes, false);
    parallel_for(B * H, 1, threads, [&](std::int64_t begin, std::int64_t end) { kernel(p, begin, end); });
}

void fp32_attention_backward(Address grad, Address q, Address k, Address v, Address out, Address lse, Address dq,
                             Address dk, Address dv, std::int64_t B, std::int64_t T, std::int64_t S, std::int64_t H,
                             std::int64_t E, const std::vector<std::int64_t>& strides, int lanes, int threads) {
    const auto forward = heads<float>(T, S, H, E, strides, q, k, v, out, lse);
    const Problem p = with_gradients(forward, strides, grad, dq, dk, dv);
    const Kernel kernel = choose(lanes, true);
    parallel_for(B * H, 1, threads, [&](std::int64_t begin, std::int64_t end) { kernel(p, begin, end); });
}

}  // namespace mimir
#endif
