// Linear layers of a transformer in bfloat16, with what stands around them: y = [r +] W·[LN](x) + b, and
// y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂, forwards and backwards, in one pass over the rows each.
//
// A thread takes a few hundred rows at a time through all of it, so that what lies between the products stays in its
// cache, and weights come packed (bf16_product.h), once for as many calls as they stay the same. A row's result depends
// on no other row, and sums over rows are made of blocks of 32 in their order: threads do not change a bit.
//
// Legend: M rows, K inputs, N outputs, H hidden numbers; x, r, y and their gradients float32 or bfloat16.
#include <algorithm>
#include <vector>

#include "bf16_rows.h"
#include "functions.h"
#include "parallel.h"

#ifdef MIMIR_BF16_MATRIX
namespace mimir {
namespace {

constexpr std::int64_t kRows = 256;  // at a time, at most

// Blocks of 32 rows [begin, end) are taken so many rows at a time: evenly, since the weights come by for each time anew.
std::int64_t rows_at_once(std::int64_t begin, std::int64_t end) {
    const std::int64_t rows = (end - begin) * 32, times = std::max<std::int64_t>((rows + kRows - 1) / kRows, 1);
    return std::max<std::int64_t>(padded((rows + times - 1) / times, 32), 32);
}

// Of `rows` of which `count` are there: those that products go through, all only where tiles have to be whole.
std::int64_t rows_used(bool amx, std::int64_t rows, std::int64_t count) { return amx ? rows : padded(count, kBlockRows); }

Matrix matrix(Address data, bool wide, std::int64_t columns) { return {pointer<char>(data), wide, columns}; }

// 32 rows at a time of weights (N, K) → a panel for x Wᵀ, and their share of every panel for g W; nullptr: not wanted.
MIMIR_BF16 void pack_panels(const Matrix& weight, std::int64_t N, std::uint32_t* forward, std::uint32_t* backward,
                            std::int64_t begin, std::int64_t end) {
    const std::int64_t across = padded(N, kPanel), along = padded(weight.columns, kPanel);
    for (std::int64_t i = begin; i < end; ++i) {
        if (forward != nullptr) pack_rows(weight, N, i, forward + i * along / 2 * kPanel);
        for (std::int64_t j = 0; backward != nullptr && j < along / kPanel; ++j) {
            pack_columns(weight, i * kPanel, N, kPanel, j, backward + (j * across + i * kPanel) / 2 * kPanel);
        }
    }
    _mm_sfence();  // what was streamed is there before another thread reads it
}

}  // namespace

void bf16_pack(Address weight, bool wide, std::int64_t N, std::int64_t K, Address forward, Address backward,
               int threads) {
    parallel_for(padded(N, kPanel) / kPanel, 2, threads, [&](std::int64_t begin, std::int64_t end) {
        pack_panels(matrix(weight, wide, K), N, pointer<std::uint32_t>(forward), pointer<std::uint32_t>(backward), begin,
                    end);
    });
}

namespace {

// A row of products with a panel + bias [+ residual] → columns n … n + 31 of the output.
class Finish {
  public:
    MIMIR_BF16_INLINE Finish(const float* c, std::int64_t row, std::int64_t count, std::int64_t n, const float* bias,
                             const Matrix* residual, const Matrix& out)
        : c_(c), row_(row), count_(count), n_(n), residual_(residual), out_(out), in0_(lanes(out.columns - n)),
          in1_(lanes(out.columns - n - 16)) {
        const __m512 zero = _mm512_setzero_ps();
        bias_ = {bias == nullptr ? zero : _mm512_maskz_loadu_ps(in0_, bias + n),
                 bias == nullptr ? zero : _mm512_maskz_loadu_ps(in1_, bias + n + 16)};
    }
    MIMIR_BF16_INLINE void prepare(std::int64_t r) const {
        if (r >= count_) return;
        out_.prefetch(row_ + r, n_, true);
        if (residual_ != nullptr) residual_->prefetch(row_ + r, n_, false);
    }
    MIMIR_BF16_INLINE void operator()(std::int64_t r) const {
        if (r >= count_) return;
        Line y = line(c_ + r * kPanel);
        y = {_mm512_add_ps(y.low, bias_.low), _mm512_add_ps(y.high, bias_.high)};
        if (residual_ != nullptr) {
            y.low = _mm512_add_ps(y.low, residual_->load(row_ + r, n_, in0_));
            y.high = _mm512_add_ps(y.high, residual_->load(row_ + r, n_ + 16, in1_));
        }
        out_.store(row_ + r, n_, y.low, in0_);
        out_.store(row_ + r, n_ + 16, y.high, in1_);
    }

  private:
    const float* c_;
    std::int64_t row_, count_, n_;
    const Matrix* residual_;
    Matrix out_;
    __mmask16 in0_, in1_;
    Line bias_;
};

struct Linear {
    std::int64_t M, K, N;
    bool amx;
    Matrix x, out;  // backward: out is the gradient
    Norm norm;
    float* statistics;
    const std::uint32_t* panels;
    const float* bias;
    const Matrix* residual;
};

MIMIR_BF16 void linear_rows(const Linear& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t depth = padded(p.K, kPanel), stride = row_length(p.K);
    Scratch<Use::own> scratch(2 * kRows * stride + 4 * kRows * kPanel + 128);
    auto* a = scratch.take<std::uint16_t>(kRows * stride);
    auto* c = scratch.take<float>(kRows * kPanel);
    const Tiles tiles(p.amx);
    const std::int64_t step = rows_at_once(begin, end);
    for (std::int64_t row = begin * 32; row < end * 32; row += step) {
        const std::int64_t rows = std::min(step, end * 32 - row), count = std::min(rows, p.M - row);
        const std::int64_t used = rows_used(p.amx, rows, count);
        stage(p.x, row, count, used, p.norm, p.statistics, false, a, stride);
        for (std::int64_t n = 0; n < p.N; n += kPanel) {
            panel_product(p.amx, {a, stride}, used, p.panels + n * depth / 2, depth, {c, kPanel},
                          Finish(c, row, count, n, p.bias, p.residual, p.out));
        }
    }
}

// Gradients of the input and the norm for some rows; what the weight's needs is put down.
MIMIR_BF16 void linear_rows_backward(const Linear& p, const Matrix* dx, const Matrix* along, const NormGradient& sums,
                                     const WeightGradient* weight, std::int64_t begin, std::int64_t end) {
    const std::int64_t depth = padded(p.N, kPanel), g_stride = row_length(p.N), x_stride = row_length(p.K);
    Scratch<Use::own> scratch(2 * kRows * (g_stride + x_stride) + 4 * kRows * x_stride + 256);
    auto* g = scratch.take<std::uint16_t>(kRows * g_stride);
    auto* x = scratch.take<std::uint16_t>(kRows * x_stride);
    auto* grad = scratch.take<float>(kRows * x_stride);
    const Tiles tiles(p.amx);
    const std::int64_t step = rows_at_once(begin, end);
    for (std::int64_t row = begin * 32; row < end * 32; row += step) {
        const std::int64_t rows = std::min(step, end * 32 - row), count = std::min(rows, p.M - row);
        const std::int64_t used = rows_used(p.amx, rows, count);
        stage(p.out, row, count, rows, {nullptr, nullptr, 0}, nullptr, true, g, g_stride);
        if (weight != nullptr) {
            stage(p.x, row, count, rows, p.norm, p.statistics, true, x, x_stride);
            weight->take(row, rows, {g, g_stride}, {x, x_stride});
        }
        if (dx == nullptr) continue;
        for (std::int64_t k = 0; k < p.K; k += kPanel) {
            panel_product(p.amx, {g, g_stride}, used, p.panels + k * depth / 2, depth, {grad + k, x_stride});
        }
        for (std::int64_t r = 0; r < count; ++r) {
            const float* from = grad + r * x_stride;
            if (p.norm.gamma != nullptr) {
                norm_backward(p.x, row + r, p.norm, p.statistics, from, along, *dx, sums);
                continue;
            }
            for (std::int64_t k = 0; k < p.K; k += 16) dx->store(row + r, k, _mm512_loadu_ps(from + k), lanes(p.K - k));
        }
    }
}

MIMIR_BF16 void write_weight(const WeightGradient& gradient, bool amx, float* weight, float* bias, std::int64_t begin,
                             std::int64_t end) {
    const Tiles tiles(amx);
    constexpr std::int64_t kBlocks = 4;  // their rows of gᵀ stay in the second-level cache while all of x passes by
    for (std::int64_t block = begin; block < end; block += kBlocks) {
        gradient.write(amx, block, std::min(block + kBlocks, end), weight, bias);
    }
}

}  // namespace

void bf16_linear(Address x, bool wide, Address gamma, Address beta, double eps, Address panels, Address bias,
                 Address residual, bool residual_wide, Address out, bool out_wide, Address statistics, std::int64_t M,
                 std::int64_t K, std::int64_t N, bool amx, int threads) {
    const Matrix r = matrix(residual, residual_wide, N);
    const Linear p = {M, K, N, amx, matrix(x, wide, K), matrix(out, out_wide, N),
                      {pointer<float>(gamma), pointer<float>(beta), static_cast<float>(eps)}, pointer<float>(statistics),
                      pointer<std::uint32_t>(panels), pointer<float>(bias), residual == 0 ? nullptr : &r};
    parallel_for(padded(M, 32) / 32, 1, threads, [&](std::int64_t begin, std::int64_t end) { linear_rows(p, begin, end); });
}

// dx, dgamma, dbeta, dweight, dbias: 0 where not wanted; a norm's two together, and only with dx. along: what else goes
// into dx, of x's type; 0 for nothing, and only behind a norm.
void bf16_linear_backward(Address grad, bool grad_wide, Address x, bool wide, Address gamma, Address beta,
                          Address statistics, Address panels, Address along, Address dx, Address dgamma, Address dbeta,
                          Address dweight, Address dbias, std::int64_t M, std::int64_t K, std::int64_t N, bool amx,
                          int threads) {
    const Linear p = {M, K, N, amx, matrix(x, wide, K), matrix(grad, grad_wide, N),
                      {pointer<float>(gamma), pointer<float>(beta), 0.0f}, pointer<float>(statistics),
                      pointer<std::uint32_t>(panels), nullptr, nullptr};
    Scratch<Use::shared> scratch(WeightGradient::bytes(M, N, K) + 8 * padded(M, 32) / 32 * K + 256);
    const WeightGradient weight(M, N, K, scratch);
    const NormGradient sums = {dgamma == 0 ? nullptr : scratch.take<float>(padded(M, 32) / 32 * 2 * K), K};
    const Matrix to = matrix(dx, wide, K), more = matrix(along, wide, K);
    parallel_for(padded(M, 32) / 32, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        linear_rows_backward(p, dx == 0 ? nullptr : &to, along == 0 ? nullptr : &more, sums,
                             dweight == 0 ? nullptr : &weight, begin, end);
    });
    if (dgamma != 0) add_blocks(sums, M, pointer<float>(dgamma), pointer<float>(dbeta));
    if (dweight == 0) return;
    parallel_for(padded(N, kPanel) / kPanel, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        write_weight(weight, amx, pointer<float>(dweight), pointer<float>(dbias), begin, end);
    });
}

namespace {

struct Mlp {
    std::int64_t M, K, H;
    bool amx, residual;
    Matrix x, out;  // backward: out is the gradient
    Norm norm;
    float* statistics;
    const std::uint32_t *panels1, *panels2;  // backward: of the other direction
    const float *bias1, *bias2;
    Matrix hidden;  // before the GELU; data == nullptr: not wanted
};

MIMIR_BF16 void mlp_rows(const Mlp& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t depth = padded(p.K, kPanel), stride = row_length(p.K);
    const std::int64_t inner = padded(p.H, kPanel), h_stride = row_length(p.H);
    Scratch<Use::own> scratch(2 * kRows * (stride + h_stride) + 4 * kRows * kPanel + 256);
    auto *a = scratch.take<std::uint16_t>(kRows * stride), *h = scratch.take<std::uint16_t>(kRows * h_stride);
    auto* c = scratch.take<float>(kRows * kPanel);
    const Sigmoid normal(normal_cubics());
    const bool streams = p.hidden.whole_lines();
    const Tiles tiles(p.amx);
    const std::int64_t step = rows_at_once(begin, end);
    for (std::int64_t row = begin * 32; row < end * 32; row += step) {
        const std::int64_t rows = std::min(step, end * 32 - row), count = std::min(rows, p.M - row);
        const std::int64_t used = rows_used(p.amx, rows, count);
        stage(p.x, row, count, used, p.norm, p.statistics, false, a, stride);
        for (std::int64_t n = 0; n < p.H; n += kPanel) {
            const __mmask32 inside = wide_lanes(p.H - n);
            const __m512 b0 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), p.bias1 + n);
            const __m512 b1 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), p.bias1 + n + 16);
            const auto activate = [&](std::int64_t r) MIMIR_BF16_LAMBDA {
                const Line product = line(c + r * kPanel);
                // Rounded first, as if it had been stored in between: the backward pass reads it rounded.
                const __m512i before = to_bf16({_mm512_add_ps(product.low, b0), _mm512_add_ps(product.high, b1)});
                if (p.hidden.data != nullptr && r < count) {
                    auto* to = p.hidden.data + 2 * ((row + r) * p.H + n);
                    if (streams) {
                        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), before);
                    } else {
                        _mm512_mask_storeu_epi16(to, inside, before);
                    }
                }
                const Line x = line(before);
                const Line y = {_mm512_mul_ps(x.low, normal(place(x.low))), _mm512_mul_ps(x.high, normal(place(x.high)))};
                _mm512_storeu_si512(h + r * h_stride + n, to_bf16(y));
            };
            panel_product(p.amx, {a, stride}, used, p.panels1 + n * depth / 2, depth, {c, kPanel}, activate);
        }
        for (std::int64_t n = 0; n < p.K; n += kPanel) {
            panel_product(p.amx, {h, h_stride}, used, p.panels2 + n * inner / 2, inner, {c, kPanel},
                          Finish(c, row, count, n, p.bias2, p.residual ? &p.x : nullptr, p.out));
        }
    }
    _mm_sfence();  // what was streamed is there before another thread reads it
}

MIMIR_BF16 void mlp_rows_backward(const Mlp& p, const Matrix& dx, const NormGradient& sums, const WeightGradient* first,
                                  const WeightGradient* second, std::int64_t begin, std::int64_t end) {
    const std::int64_t depth = padded(p.K, kPanel), stride = row_length(p.K);
    const std::int64_t inner = padded(p.H, kPanel), h_stride = row_length(p.H);
    Scratch<Use::own> scratch(2 * kRows * (2 * stride + 2 * h_stride) + 4 * kRows * (stride + kPanel) + 512);
    auto *g = scratch.take<std::uint16_t>(kRows * stride), *x = scratch.take<std::uint16_t>(kRows * stride);
    auto *dh = scratch.take<std::uint16_t>(kRows * h_stride), *h = scratch.take<std::uint16_t>(kRows * h_stride);
    auto *grad = scratch.take<float>(kRows * stride), *c = scratch.take<float>(kRows * kPanel);
    const Sigmoid normal(normal_cubics()), slope(gelu_slope_cubics());
    const Tiles tiles(p.amx);
    const std::int64_t step = rows_at_once(begin, end);
    for (std::int64_t row = begin * 32; row < end * 32; row += step) {
        const std::int64_t rows = std::min(step, end * 32 - row), count = std::min(rows, p.M - row);
        const std::int64_t used = rows_used(p.amx, rows, count);
        stage(p.out, row, count, rows, {nullptr, nullptr, 0}, nullptr, true, g, stride);
        // Read row by row, which the processor foresees; columns of it, 64 bytes every few thousand, it does not.
        stage(p.hidden, row, count, rows, {nullptr, nullptr, 0}, nullptr, true, h, h_stride);
        for (std::int64_t n = 0; n < p.H; n += kPanel) {
            const auto differentiate = [&](std::int64_t r) MIMIR_BF16_LAMBDA {
                const std::int64_t at = r * h_stride + n;
                const Line x = line(_mm512_loadu_si512(h + at)), product = line(c + r * kPanel);
                const Place low = place(x.low), high = place(x.high);
                const Line grad = {_mm512_mul_ps(product.low, slope(low)), _mm512_mul_ps(product.high, slope(high))};
                _mm512_storeu_si512(dh + at, to_bf16(grad));
                if (second == nullptr) return;
                const Line y = {_mm512_mul_ps(x.low, normal(low)), _mm512_mul_ps(x.high, normal(high))};
                _mm512_storeu_si512(h + at, to_bf16(y));
            };
            panel_product(p.amx, {g, stride}, used, p.panels2 + n * depth / 2, depth, {c, kPanel}, differentiate);
        }
        if (second != nullptr) {
            std::fill(dh + used * h_stride, dh + rows * h_stride, std::uint16_t{0});
            second->take(row, rows, {g, stride}, {h, h_stride});
            stage(p.x, row, count, rows, p.norm, p.statistics, true, x, stride);
            first->take(row, rows, {dh, h_stride}, {x, stride});
        }
        for (std::int64_t k = 0; k < p.K; k += kPanel) {
            panel_product(p.amx, {dh, h_stride}, used, p.panels1 + k * inner / 2, inner, {grad + k, stride});
        }
        for (std::int64_t r = 0; r < count; ++r) {
            const Matrix* along = p.residual ? &p.out : nullptr;
            norm_backward(p.x, row + r, p.norm, p.statistics, grad + r * stride, along, dx, sums);
        }
    }
}

}  // namespace

void bf16_mlp(Address x, bool wide, Address gamma, Address beta, double eps, Address panels1, Address bias1,
              Address panels2, Address bias2, bool residual, Address out, Address hidden, Address statistics,
              std::int64_t M, std::int64_t K, std::int64_t H, bool amx, int threads) {
    const Mlp p = {M, K, H, amx, residual, matrix(x, wide, K), matrix(out, residual && wide, K),
                   {pointer<float>(gamma), pointer<float>(beta), static_cast<float>(eps)}, pointer<float>(statistics),
                   pointer<std::uint32_t>(panels1), pointer<std::uint32_t>(panels2), pointer<float>(bias1),
                   pointer<float>(bias2), matrix(hidden, false, H)};
    parallel_for(padded(M, 32) / 32, 1, threads, [&](std::int64_t begin, std::int64_t end) { mlp_rows(p, begin, end); });
}

// parameters: gamma, beta, weight 1, bias 1, weight 2, bias 2; nowhere (0) if their gradients are not wanted.
void bf16_mlp_backward(Address grad, Address x, bool wide, Address gamma, Address beta, Address statistics,
                       Address hidden, Address panels1, Address panels2, bool residual, Address dx,
                       const std::vector<Address>& parameters, std::int64_t M, std::int64_t K, std::int64_t H, bool amx,
                       int threads) {
    const Mlp p = {M, K, H, amx, residual, matrix(x, wide, K), matrix(grad, residual && wide, K),
                   {pointer<float>(gamma), pointer<float>(beta), 0.0f}, pointer<float>(statistics),
                   pointer<std::uint32_t>(panels1), pointer<std::uint32_t>(panels2), nullptr, nullptr,
                   matrix(hidden, false, H)};
    const bool all = !parameters.empty();
    Scratch<Use::shared> scratch(
        all ? WeightGradient::bytes(M, H, K) + WeightGradient::bytes(M, K, H) + 8 * padded(M, 32) / 32 * K + 256 : 64);
    if (!all) {
        parallel_for(padded(M, 32) / 32, 1, threads, [&](std::int64_t begin, std::int64_t end) {
            mlp_rows_backward(p, matrix(dx, wide, K), {nullptr, K}, nullptr, nullptr, begin, end);
        });
        return;
    }
    const WeightGradient first(M, H, K, scratch), second(M, K, H, scratch);
    const NormGradient sums = {scratch.take<float>(padded(M, 32) / 32 * 2 * K), K};
    parallel_for(padded(M, 32) / 32, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        mlp_rows_backward(p, matrix(dx, wide, K), sums, &first, &second, begin, end);
    });
    add_blocks(sums, M, pointer<float>(parameters[0]), pointer<float>(parameters[1]));
    const std::int64_t blocks1 = padded(H, kPanel) / kPanel, blocks2 = padded(K, kPanel) / kPanel;
    parallel_for(blocks1, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        write_weight(first, amx, pointer<float>(parameters[2]), pointer<float>(parameters[3]), begin, end);
    });
    parallel_for(blocks2, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        write_weight(second, amx, pointer<float>(parameters[4]), pointer<float>(parameters[5]), begin, end);
    });
}

}  // namespace mimir
#endif
