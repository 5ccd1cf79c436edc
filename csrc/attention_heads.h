// Where the heads of an attention lie in memory: what the kernels of both precisions are given.
//
// Legend: B images, T queries, S keys, H heads of E numbers; q (B, T, H, E), k and v (B, S, H, E) with the heads of a token
// in one piece; lse is the log-sum-exp of each query's scores.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "functions.h"
#include "multiversion.h"

namespace mimir {

template <typename Number>
struct HeadTokens {
    Number* data;
    std::int64_t batch_stride, token_stride, E;

    MIMIR_INLINE Number* at(std::int64_t b, std::int64_t t, std::int64_t h) const {
        return data + b * batch_stride + t * token_stride + h * E;
    }
};

template <typename Number>
struct Heads {
    std::int64_t T, S, H, E;
    HeadTokens<Number> q, k, v, out;
    float* lse;  // (B, H, T)
    HeadTokens<Number> grad, dq, dk, dv;  // backward only

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(E)); }

    // The tensor `index` of those that `strides` tells of: (image, token) each, in numbers.
    HeadTokens<Number> tokens(Address address, const std::vector<std::int64_t>& strides, std::size_t index) const {
        return {pointer<Number>(address), strides[2 * index], strides[2 * index + 1], E};
    }
    // Contiguous, a token for each query.
    HeadTokens<Number> whole(Address address) const { return {pointer<Number>(address), T * H * E, H * E, E}; }
};

// strides: of q, k and v; out and lse are contiguous.
template <typename Number>
Heads<Number> heads(std::int64_t T, std::int64_t S, std::int64_t H, std::int64_t E,
                    const std::vector<std::int64_t>& strides, Address q, Address k, Address v, Address out, Address lse) {
    Heads<Number> p{};
    p.T = T;
    p.S = S;
    p.H = H;
    p.E = E;
    p.q = p.tokens(q, strides, 0);
    p.k = p.tokens(k, strides, 1);
    p.v = p.tokens(v, strides, 2);
    p.out = p.whole(out);
    p.lse = pointer<float>(lse);
    return p;
}

// strides: also of dq, dk and dv; grad is contiguous.
template <typename Number>
Heads<Number> with_gradients(Heads<Number> p, const std::vector<std::int64_t>& strides, Address grad, Address dq,
                             Address dk, Address dv) {
    p.grad = p.whole(grad);
    p.dq = p.tokens(dq, strides, 3);
    p.dk = p.tokens(dk, strides, 4);
    p.dv = p.tokens(dv, strides, 5);
    return p;
}

}  // namespace mimir
