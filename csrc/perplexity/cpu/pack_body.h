// Operands of the matrix products, in the layouts that common/product.h states: A row-major, and B
// in panels of n columns, [ceil(k / kPair)][n][kPair] with kPair 2 for bfloat16 (its k is even) and
// 1 otherwise (no include guard: part of a body).

template <class Operand>
constexpr int kPairOf = std::is_same_v<Operand, BFloat16> ? 2 : 1;

// Types differ only where the result is float.
template <class From, class To>
inline void convert_row(const From* from, int64_t stride, To* to, int64_t count) {
  if (stride == 1) {
    if constexpr (std::is_same_v<From, To>) {
      __builtin_memcpy(to, from, count * sizeof(To));
    } else {
      load_row(from, to, count);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<From, To>) {
      to[i] = from[i * stride];
    } else {
      to[i] = load(from[i * stride]);
    }
  }
}

// [rows][columns] -> the panel whose k runs over the columns and whose n are the rows, zero beyond
// them: in words of kPair elements that is a transposition.
template <class Operand>
inline void panel_of_columns(const Operand* from, int64_t rows, int64_t columns, int64_t n,
                             Operand* to) {
  using Word = std::conditional_t<kPairOf<Operand> == 2, float, Operand>;
  const int64_t words = columns / kPairOf<Operand>;
  transpose(reinterpret_cast<const Word*>(from), words, rows, words, reinterpret_cast<Word*>(to), n,
            n);
}

// n columns of [rows][columns] from column `first` -> the panel whose k runs over `padded` rows,
// zero beyond `rows` and beyond `columns`.
template <class Operand>
inline void panel_of_rows(const Operand* from, int64_t rows, int64_t padded, int64_t columns,
                          int64_t first, int64_t n, Operand* to) {
  constexpr int kPair = kPairOf<Operand>;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t have = r < rows ? std::min(columns - first, n) : 0;
    Operand* const out = to + r / kPair * n * kPair + r % kPair;
    for (int64_t c = 0; c < have; ++c) out[c * kPair] = from[r * columns + first + c];
    for (int64_t c = have; c < n; ++c) out[c * kPair] = Operand{};
  }
}

// The gradient tile [m][n], rounded to Operand, as rows with stride ld and as a panel over the
// tile's rows; either may be null.
template <class Operand>
inline void store_gradient(const RealOf<Operand>* tile, int64_t m, int64_t n, Operand* rows,
                           int64_t ld, Operand* panel) {
  for (int64_t v = 0; rows && v < m; ++v) {
    for (int64_t c = 0; c < n; ++c) store(rows + v * ld + c, tile[v * n + c]);
  }
  constexpr int kPair = kPairOf<Operand>;
  for (int64_t v = 0; panel && v < m; v += kPair) {
    for (int64_t c = 0; c < n; ++c) {
      for (int i = 0; i < kPair; ++i) {
        store(panel + (v * n + c * kPair) + i, tile[(v + i) * n + c]);
      }
    }
  }
}

// C[m, n] = A[m, k] B[k, n] (added to C where `add`), for float64, whose only use is gradcheck.
inline void multiply_doubles(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add,
                             const double* a, const double* b, double* c) {
  for (int64_t i = 0; i < m; ++i) {
    double* const row = c + i * ldc;
    if (!add) std::fill_n(row, n, 0.0);
    for (int64_t p = 0; p < k; ++p) {
      const double x = a[i * lda + p];
      for (int64_t j = 0; j < n; ++j) row[j] += x * b[p * n + j];
    }
  }
}
