// Vectors of float32, and products of small matrices in them, for the instruction set it is compiled for: included once
// for each, in a namespace of its own, after that namespace's kLanes (numbers in a vector) and kRegisters. (Templates over
// the two will not do: GCC takes vectors apart that the plain instruction set of a template does not know.)
//
// Legend: C (M, N) = or += A (M, K) · B (K, N). N is a multiple of kLanes and B and C are dense along it; A is read one
// number at a time, in any layout, and meets a whole vector of B.

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::int64_t Pairs __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }

// One number in all lanes, or two in alternation.
inline Vector everywhere(float x) { return x - Vector{}; }
inline Vector everywhere(std::int64_t pair) { return (Vector)(pair + Pairs{}); }

template <int... i>
inline void interleave(Vector a, Vector b, Vector* first, Vector* second, std::integer_sequence<int, i...>) {
    *first = __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes)...);
    *second = __builtin_shufflevector(a, b, (kLanes / 2 + i / 2 + i % 2 * kLanes)...);
}
// a0 b0 a1 b1 …, in two vectors.
inline void interleave(Vector a, Vector b, Vector* first, Vector* second) {
    interleave(a, b, first, second, std::make_integer_sequence<int, kLanes>());
}

// The bits of a number's place among kCount vectors of kLanes go round: the highest becomes the lowest, kRounds times.
template <int kRounds, int kCount>
inline void rotate(Vector (&rows)[kCount]) {
#pragma GCC unroll 4
    for (int round = 0; round < kRounds; ++round) {
        Vector turned[kCount];
#pragma GCC unroll 4
        for (int i = 0; i < kCount / 2; ++i) {
            interleave(rows[i], rows[i + kCount / 2], &turned[2 * i], &turned[2 * i + 1]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) rows[i] = turned[i];
    }
}

constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// 2^y for y <= 0 (a rounding error above does no harm); a NaN stays.
inline Vector exp2_of_nonpositive(Vector y) {
    const Vector least = Vector{} - 126.0f;
    y = y < least ? least : y;
    const Vector shifted = y + 12582912.0f;  // 1.5·2^23: leaves the nearest integer in the low bits
    const Vector f = y - (shifted - 12582912.0f);
    Vector p = kExp2[6] * f + kExp2[5];
#pragma GCC unroll 5
    for (int n = 4; n >= 0; --n) p = p * f + kExp2[n];
    return (Vector)((Bits)p + ((Bits)shifted << 23));
}

// Rows of memory that will be needed soon: fetched between products, a few at a time, so that nobody waits for them.
class Ahead {
  public:
    Ahead(const float** rows, std::int64_t row_bytes) : rows_(rows), row_bytes_(row_bytes) {}
    void add(const float* row) { rows_[count_++] = row; }
    void clear() { count_ = next_ = due_ = 0; }
    void step(std::int64_t multiply_adds) {  // of vectors
        constexpr std::int64_t kPerLine = 128;  // measured: a line in 64 cycles does not fill the queue of misses
        for (due_ += multiply_adds * 64 / kPerLine; due_ > 0 && next_ < count_; due_ -= row_bytes_) {
            const char* row = reinterpret_cast<const char*>(rows_[next_++]);
            for (std::int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
        }
    }

  private:
    const float** rows_;
    std::int64_t row_bytes_, count_ = 0, next_ = 0, due_ = 0;  // due in bytes
};

template <typename Number>
struct AnyLayout {
    const Number* data;  // std::int64_t: pairs of float32
    std::int64_t row, column;  // strides
};
struct Rows {
    float* data;
    std::int64_t stride;
};

// kRows by kVectors registers of C, all of K.
template <int kRows, int kVectors, typename Number>
inline void multiply_tile(std::int64_t K, AnyLayout<Number> a, Rows b, Rows c, bool add) {
    Vector sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sum[m][n] = add ? load(c.data + m * c.stride + n * kLanes) : Vector{};
    }
    for (std::int64_t k = 0; k < K; ++k) {
        Vector x[kVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) x[n] = load(b.data + k * b.stride + n * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const Vector y = everywhere(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) sum[m][n] += y * x[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) store(c.data + m * c.stride + n * kLanes, sum[m][n]);
    }
}

// Rows that, with a row of B and a number of A, fill the registers; more than eight gain nothing.
constexpr int rows_beside(int vectors) {
    const int rows = (kRegisters - 2 - vectors) / vectors;
    return rows > 8 ? 8 : rows;
}

template <int kVectors, typename Number>
void multiply_columns(std::int64_t M, std::int64_t K, AnyLayout<Number> a, Rows b, Rows c, bool add, Ahead& ahead) {
    constexpr int kRows = rows_beside(kVectors);
    std::int64_t m = 0;
    const auto step = [&](auto rows) {
        for (; m + rows <= M; m += rows) {
            const AnyLayout<Number> a_m = {a.data + m * a.row, a.row, a.column};
            multiply_tile<rows, kVectors>(K, a_m, b, {c.data + m * c.stride, c.stride}, add);
            ahead.step(rows * kVectors * K);
        }
    };
    step(std::integral_constant<int, kRows>());
    step(std::integral_constant<int, (kRows + 1) / 2>());
    step(std::integral_constant<int, 1>());
}

template <typename Number>
void multiply(std::int64_t M, std::int64_t N, std::int64_t K, AnyLayout<Number> a, Rows b, Rows c, bool add,
              Ahead& ahead) {
    for (std::int64_t n = 0; n < N;) {
        const std::int64_t left = (N - n) / kLanes, vectors = left % 4 == 0 ? 4 : left < 3 ? left : 3;
        const Rows b_n = {b.data + n, b.stride}, c_n = {c.data + n, c.stride};
        if (vectors == 4) multiply_columns<4>(M, K, a, b_n, c_n, add, ahead);
        if (vectors == 3) multiply_columns<3>(M, K, a, b_n, c_n, add, ahead);
        if (vectors == 2) multiply_columns<2>(M, K, a, b_n, c_n, add, ahead);
        if (vectors == 1) multiply_columns<1>(M, K, a, b_n, c_n, add, ahead);
        n += vectors * kLanes;
    }
}

// For a K of 8: B stays in registers.
template <int kVectors>
void multiply_shallow(std::int64_t M, const float* a, Rows b, Rows c, Ahead& ahead) {
    constexpr int kDepth = 8, kRows = 16;
    Vector x[kDepth][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kDepth; ++k) {
#pragma GCC unroll 3
        for (int n = 0; n < kVectors; ++n) x[k][n] = load(b.data + k * b.stride + n * kLanes);
    }
    for (std::int64_t m = 0; m < M; ++m) {
        Vector sum[kVectors] = {};
#pragma GCC unroll 8
        for (int k = 0; k < kDepth; ++k) {
            const Vector y = everywhere(a[kDepth * m + k]);
#pragma GCC unroll 3
            for (int n = 0; n < kVectors; ++n) sum[n] += y * x[k][n];
        }
#pragma GCC unroll 3
        for (int n = 0; n < kVectors; ++n) store(c.data + m * c.stride + n * kLanes, sum[n]);
        if (m % kRows == 0) ahead.step(kRows * kDepth * kVectors);
    }
}
