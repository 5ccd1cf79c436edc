// The part of fp32_attention.cpp that is compiled once for each instruction set: see fp32_vectors.h.

constexpr std::int64_t W = kQueryVectors * kLanes;  // queries at a time

// Some queries of one head of one image, a lane each.
struct Block {
    std::int64_t b, h, first, inside;  // the last lanes may be padding
    int vectors;

    std::int64_t width() const { return vectors * kLanes; }
};

// Calls body(block) for blocks of nearly equal size that cover all queries of a head.
template <typename Body>
void for_blocks(const Problem& p, std::int64_t head, const Body& body) {
    const std::int64_t vectors = padded(p.T, kLanes) / kLanes, blocks = (vectors + kQueryVectors - 1) / kQueryVectors;
    for (std::int64_t i = 0; i < blocks; ++i) {
        const std::int64_t begin = vectors * i / blocks, end = vectors * (i + 1) / blocks, first = begin * kLanes;
        const std::int64_t inside = std::min(p.T - first, (end - begin) * kLanes);
        body(Block{head / p.H, head % p.H, first, inside, static_cast<int>(end - begin)});
    }
}

// Calls body(number of vectors as a constant).
template <typename Body>
inline void with_vectors(const Block& block, const Body& body) {
    if (block.vectors == 3) body(std::integral_constant<int, 3>());
    if (block.vectors == 2) body(std::integral_constant<int, 2>());
    if (block.vectors == 1) body(std::integral_constant<int, 1>());
}

void expect(Ahead& ahead, const Problem& p, const Tokens& tokens, std::int64_t head, std::int64_t count) {
    for (std::int64_t t = 0; t < count; ++t) ahead.add(tokens.at(head / p.H, t, head % p.H));
}

void copy(const Problem& p, const Tokens& tokens, std::int64_t head, std::int64_t count, float* to) {
    for (std::int64_t t = 0; t < count; ++t) {
        std::memcpy(to + t * p.E, tokens.at(head / p.H, t, head % p.H), p.E * sizeof(float));
    }
}

// A few neighbouring numbers of one or two tokens make a vector.
constexpr int kGroup = kLanes < 8 ? kLanes : 8, kTogether = kLanes / kGroup;
typedef float Group __attribute__((vector_size(4 * kGroup)));
typedef float UnalignedGroup __attribute__((vector_size(4 * kGroup), aligned(4), may_alias));

template <int... i>
inline Vector join(Group a, Group b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, i...);
}

// Tokens of a block → a lane each, (E, W); zeros where there are none.
void turn(const Tokens& tokens, std::int64_t E, const Block& block, float* to) {
    const auto group = [&](std::int64_t t, std::int64_t e) {
        const float* from = tokens.at(block.b, block.first + t, block.h) + e;
        return t < block.inside ? *reinterpret_cast<const UnalignedGroup*>(from) : Group{};
    };
    for (std::int64_t t = 0; t < block.width(); t += kLanes) {
        for (std::int64_t e = 0; e < E; e += kGroup) {
            Vector rows[kGroup];
            for (int i = 0; i < kGroup; ++i) {
                const Group first = group(t + i * kTogether, e), last = group(t + (i + 1) * kTogether - 1, e);
                rows[i] = join(first, last, std::make_integer_sequence<int, kLanes>());
            }
            rotate<log2_of(kLanes)>(rows);
            for (int i = 0; i < kGroup; ++i) store(to + (e + i) * W + t, rows[i]);
        }
    }
}

// And back: each lane's numbers times its factor.
void turn_back(const float* from, const float* factors, std::int64_t E, const Block& block, const Tokens& tokens) {
    for (std::int64_t t = 0; t < block.inside; t += kLanes) {
        const Vector factor = load(factors + t);
        for (std::int64_t e = 0; e < E; e += kGroup) {
            Vector rows[kGroup];
            for (int i = 0; i < kGroup; ++i) rows[i] = load(from + (e + i) * W + t) * factor;
            rotate<log2_of(kGroup)>(rows);
            for (int i = 0; i < kLanes && t + i < block.inside; ++i) {
                const float* numbers = reinterpret_cast<const float*>(rows) + i * kGroup;
                std::memcpy(tokens.at(block.b, block.first + t + i, block.h) + e, numbers, kGroup * sizeof(float));
            }
        }
    }
}

// C (M, W) = A (M, E) · B (E, W)
void multiply_by_queries(std::int64_t M, std::int64_t E, const float* a, float* b, const Block& block, float* c,
                         Ahead& ahead) {
    if (E == 8 && kRegisters == 32) {
        with_vectors(block, [&](auto vectors) { multiply_shallow<vectors>(M, a, {b, W}, {c, W}, ahead); });
    } else {
        multiply(M, block.width(), E, AnyLayout<float>{a, E, 1}, {b, W}, {c, W}, false, ahead);
    }
}

// Scores (S, W) → probabilities but for their sums.
template <int kVectors>
void softmax(float* scores, std::int64_t S, float scale, float* largest, float* sums) {
    Vector most[kVectors], shift[kVectors], sum[kVectors];
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) most[i] = load(scores + i * kLanes);
    for (std::int64_t j = 1; j < S; ++j) {
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; ++i) {
            const Vector x = load(scores + j * W + i * kLanes);
            most[i] = most[i] < x ? x : most[i];
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) {
        shift[i] = most[i] * (scale * kLog2E);
        sum[i] = Vector{};
    }
    for (std::int64_t j = 0; j < S; ++j) {
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; ++i) {
            const Vector x = exp2_of_nonpositive(load(scores + j * W + i * kLanes) * (scale * kLog2E) - shift[i]);
            sum[i] += x;
            store(scores + j * W + i * kLanes, x);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) {
        store(largest + i * kLanes, most[i]);
        store(sums + i * kLanes, sum[i]);
    }
}

void forward_heads(const Problem& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t T = p.T, S = p.S, E = p.E;
    Scratch<Use::own> scratch(4 * (2 * S * E + 2 * E * W + S * W) + 8 * 2 * (T + S) + 1024);
    auto *keys = scratch.take<float>(S * E), *values = scratch.take<float>(S * E);
    auto *queries = scratch.take<float>(E * W), *out = scratch.take<float>(E * W), *scores = scratch.take<float>(S * W);
    Ahead ahead(scratch.take<const float*>(2 * (T + S)), 4 * E);
    alignas(64) float largest[W], sums[W], shares[W];
    const float scale = p.scale();
    for (std::int64_t head = begin; head < end; ++head) {
        copy(p, p.k, head, S, keys);
        copy(p, p.v, head, S, values);
        ahead.clear();
        expect(ahead, p, p.out, head, T);
        if (head + 1 < end) {
            expect(ahead, p, p.q, head + 1, T);
            expect(ahead, p, p.k, head + 1, S);
            expect(ahead, p, p.v, head + 1, S);
        }
        for_blocks(p, head, [&](const Block& block) {
            turn(p.q, E, block, queries);
            multiply_by_queries(S, E, keys, queries, block, scores, ahead);
            with_vectors(block, [&](auto vectors) { softmax<vectors>(scores, S, scale, largest, sums); });
            for (std::int64_t j = 0; j < S; j += kKeys) {
                multiply(E, block.width(), std::min(kKeys, S - j), AnyLayout<float>{values + j * E, 1, E},
                         {scores + j * W, W}, {out, W}, j > 0, ahead);
            }
            for (std::int64_t t = 0; t < block.width(); ++t) shares[t] = 1.0f / sums[t];
            turn_back(out, shares, E, block, p.out);
            for (std::int64_t t = 0; t < block.inside; ++t) {
                p.lse[head * T + block.first + t] = scale * largest[t] + std::log(sums[t]);
            }
        });
    }
}

// (keys, W) scores and products dp → ds = p (dp − along) in the place of dp, and pairs of (p, ds).
template <int kVectors>
void differentiate(const float* scores, float* products, float* pairs, std::int64_t keys, float scale,
                   const float* shifts, const float* along) {
    for (std::int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; ++i) {
            const std::int64_t at = j * W + i * kLanes;
            const Vector p = exp2_of_nonpositive(load(scores + at) * (scale * kLog2E) - load(shifts + i * kLanes));
            const Vector ds = p * (load(products + at) - load(along + i * kLanes));
            store(products + at, ds);
            Vector first, second;
            interleave(p, ds, &first, &second);
            store(pairs + 2 * at, first);
            store(pairs + 2 * at + kLanes, second);
        }
    }
}

// Rows of the queries of a block (W, 2E): numbers of grad and of q in alternation; zeros where there are none.
void alternate(const Problem& p, const Block& block, float* rows) {
    for (std::int64_t t = 0; t < block.width(); ++t) {
        float* row = rows + t * 2 * p.E;
        if (t >= block.inside) {
            std::fill(row, row + 2 * p.E, 0.0f);
            continue;
        }
        const float* grad = p.grad.at(block.b, block.first + t, block.h);
        const float* q = p.q.at(block.b, block.first + t, block.h);
        for (std::int64_t e = 0; e < p.E; ++e) {
            row[2 * e] = grad[e];
            row[2 * e + 1] = q[e];
        }
    }
}

// out_t = Σ_e a[e][t] b[e][t]
void inner_products(const float* a, const float* b, std::int64_t E, const Block& block, float* out) {
    for (std::int64_t t = 0; t < block.width(); t += kLanes) {
        Vector sum = {};
        for (std::int64_t e = 0; e < E; ++e) sum += load(a + e * W + t) * load(b + e * W + t);
        store(out + t, sum);
    }
}

void backward_heads(const Problem& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t T = p.T, S = p.S, E = p.E;
    Scratch<Use::own> scratch(4 * (4 * S * E + 5 * E * W + 4 * kKeys * W) + 8 * 4 * (T + S) + 1024);
    auto *keys = scratch.take<float>(S * E), *values = scratch.take<float>(S * E);
    auto* dv_dk = scratch.take<float>(S * 2 * E);  // in alternation
    auto *queries = scratch.take<float>(E * W), *grads = scratch.take<float>(E * W), *dq = scratch.take<float>(E * W);
    auto* rows = scratch.take<float>(W * 2 * E);
    auto *scores = scratch.take<float>(kKeys * W), *products = scratch.take<float>(kKeys * W);
    auto* pairs = scratch.take<float>(kKeys * 2 * W);
    Ahead ahead(scratch.take<const float*>(4 * (T + S)), 4 * E);
    alignas(64) float shifts[W], along[W], scales[W];
    const float scale = p.scale();
    std::fill(scales, scales + W, scale);
    for (std::int64_t head = begin; head < end; ++head) {
        copy(p, p.k, head, S, keys);
        copy(p, p.v, head, S, values);
        ahead.clear();
        expect(ahead, p, p.dq, head, T);
        expect(ahead, p, p.dk, head, S);
        expect(ahead, p, p.dv, head, S);
        if (head + 1 < end) {
            for (const Tokens& tokens : {p.q, p.grad, p.out}) expect(ahead, p, tokens, head + 1, T);
            expect(ahead, p, p.k, head + 1, S);
            expect(ahead, p, p.v, head + 1, S);
        }
        for_blocks(p, head, [&](const Block& block) {
            turn(p.q, E, block, queries);
            turn(p.grad, E, block, grads);
            turn(p.out, E, block, dq);
            inner_products(grads, dq, E, block, along);
            alternate(p, block, rows);
            for (std::int64_t t = 0; t < block.width(); ++t) {
                shifts[t] = t < block.inside ? kLog2E * p.lse[head * T + block.first + t] : 0.0f;
            }
            for (std::int64_t j = 0; j < S; j += kKeys) {
                const std::int64_t count = std::min(kKeys, S - j);
                multiply_by_queries(count, E, keys + j * E, queries, block, scores, ahead);
                multiply_by_queries(count, E, values + j * E, grads, block, products, ahead);
                with_vectors(block, [&](auto vectors) {
                    differentiate<vectors>(scores, products, pairs, count, scale, shifts, along);
                });
                const AnyLayout<float> turned_keys = {keys + j * E, 1, E};
                multiply(E, block.width(), count, turned_keys, {products, W}, {dq, W}, j > 0, ahead);
                const AnyLayout<std::int64_t> p_ds = {reinterpret_cast<const std::int64_t*>(pairs), W, 1};
                const Rows to_keys = {dv_dk + j * 2 * E, 2 * E};
                multiply(count, 2 * E, block.width(), p_ds, {rows, 2 * E}, to_keys, block.first > 0, ahead);
            }
            turn_back(dq, scales, E, block, p.dq);
        });
        for (std::int64_t j = 0; j < S; ++j) {
            const float* from = dv_dk + j * 2 * E;
            float *dk = p.dk.at(head / p.H, j, head % p.H), *dv = p.dv.at(head / p.H, j, head % p.H);
            for (std::int64_t e = 0; e < E; ++e) {
                dv[e] = from[2 * e];
                dk[e] = scale * from[2 * e + 1];
            }
        }
    }
}
