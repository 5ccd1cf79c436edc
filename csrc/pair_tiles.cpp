// What happens to a tile of X·Xᵀ once the BLAS has computed it: distances, expm1, row and column sums, products.
//
// The PyTorch equivalent, in mimir_fast/ops/dependence/pair_tiles.py, walks over a tile a dozen times; here it is once. Sums are
// float64. Rows are cut into chunks of fixed size whose partial sums are added in order, so the number of threads does
// not change a bit of the result.
#include <vector>

#include "exponential.h"
#include "functions.h"
#include "multiversion.h"
#include "parallel.h"

namespace mimir {
namespace {

constexpr std::int64_t kChunk = 32;

// A row of the Gram matrix becomes a row of K - 1. Returns its sum; adds its elements to `columns` unless that is null.
MIMIR_MULTIVERSION
double kernel_row(float* row, float norm_i, const float* norms_j, float gamma, double* columns, std::int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < n; ++j) {
        float d2 = (norm_i + norms_j[j]) - 2.0f * row[j];
        d2 = d2 < 0.0f ? 0.0f : d2;
        row[j] = expm1_of_nonpositive(-gamma * d2);
        sum += static_cast<double>(row[j]);
    }
    if (columns) {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) columns[j] += static_cast<double>(row[j]);
    }
    return sum;
}

MIMIR_MULTIVERSION
double product_row(const float* k, const float* l, std::int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < n; ++j) sum += static_cast<double>(k[j]) * static_cast<double>(l[j]);
    return sum;
}

MIMIR_MULTIVERSION
double weight_row(const float* k, const float* l, float grad_s, float half_i, const float* half_j, float* out,
                  double* columns, std::int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < n; ++j) {
        out[j] = (k[j] + 1.0f) * (grad_s * l[j] + (half_i + half_j[j]));
        sum += static_cast<double>(out[j]);
    }
    if (columns) {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) columns[j] += static_cast<double>(out[j]);
    }
    return sum;
}

// Runs row(i, columns of i's chunk) over all rows; then adds the chunks' column sums, in order, to `column_sums`.
template <typename Row>
void for_rows(std::int64_t rows, std::int64_t cols, double* column_sums, int threads, const Row& row) {
    const std::int64_t chunks = (rows + kChunk - 1) / kChunk;
    std::vector<double> partial(column_sums ? chunks * cols : 0, 0.0);
    // Below some 16,000 elements waking a thread costs more than the work.
    const std::int64_t grain = 1 + 16384 / (kChunk * std::max<std::int64_t>(cols, 1));
    parallel_for(chunks, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
            double* columns = column_sums ? partial.data() + chunk * cols : nullptr;
            for (std::int64_t i = chunk * kChunk; i < std::min(rows, (chunk + 1) * kChunk); ++i) row(i, columns);
        }
    });
    if (!column_sums) return;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double* columns = partial.data() + chunk * cols;
        for (std::int64_t j = 0; j < cols; ++j) column_sums[j] += columns[j];
    }
}

}  // namespace

// gram (rows, cols, row stride `stride`) becomes K - 1 in place. `diagonal`: the tile lies on the diagonal of K, whose
// elements become exactly 0. Row sums are added to row_sums, column sums to column_sums; either may be null.
void kernel_from_gram(Address gram_address, std::int64_t stride, std::int64_t rows, std::int64_t cols,
                      Address norms_i_address, Address norms_j_address, float gamma, bool diagonal,
                      Address row_sums_address, Address column_sums_address, int threads) {
    auto* gram = pointer<float>(gram_address);
    const auto* norms_i = pointer<const float>(norms_i_address);
    const auto* norms_j = pointer<const float>(norms_j_address);
    auto* row_sums = pointer<double>(row_sums_address);
    for_rows(rows, cols, pointer<double>(column_sums_address), threads, [&](std::int64_t i, double* columns) {
        float* row = gram + i * stride;
        // The norms are the diagonal of the same product, so this distance comes out as 0 without being forced to
        // (unless it is a NaN, which is to stay).
        if (diagonal) row[i] = norms_i[i];
        const double sum = kernel_row(row, norms_i[i], norms_j, gamma, columns, cols);
        if (row_sums) row_sums[i] += sum;
    });
}

// Sum over k * l of two tiles.
double inner_product(Address k_address, std::int64_t stride_k, Address l_address, std::int64_t stride_l,
                     std::int64_t rows, std::int64_t cols, int threads) {
    const auto* k = pointer<const float>(k_address);
    const auto* l = pointer<const float>(l_address);
    std::vector<double> sums(rows);
    for_rows(rows, cols, nullptr, threads,
             [&](std::int64_t i, double*) { sums[i] = product_row(k + i * stride_k, l + i * stride_l, cols); });
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}

// out = (k + 1) * (grad_s * l + half_i + half_j), with its row and column sums (the latter may be null).
void pair_weights(Address k_address, std::int64_t stride_k, Address l_address, std::int64_t stride_l, std::int64_t rows,
                  std::int64_t cols, float grad_s, Address half_i_address, Address half_j_address, Address out_address,
                  Address row_sums_address, Address column_sums_address, int threads) {
    const auto* k = pointer<const float>(k_address);
    const auto* l = pointer<const float>(l_address);
    const auto* half_i = pointer<const float>(half_i_address);
    const auto* half_j = pointer<const float>(half_j_address);
    auto* out = pointer<float>(out_address);
    auto* row_sums = pointer<double>(row_sums_address);
    for_rows(rows, cols, pointer<double>(column_sums_address), threads, [&](std::int64_t i, double* columns) {
        row_sums[i] += weight_row(k + i * stride_k, l + i * stride_l, grad_s, half_i[i], half_j, out + i * cols, columns,
                                  cols);
    });
}

}  // namespace mimir
