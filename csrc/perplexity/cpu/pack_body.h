// Operands of the matrix products, in the layouts that perplexity.h states: B in panels of n
// columns, [ceil(k / kPair)][n][kPair] with kPair 2 for bfloat16 (its k is even) and 1 otherwise,
// and A row-major. Compiled once per instruction set; needs elements_body.h before it.

template <class Operand>
struct PairOf {
  static constexpr int kPair = 1;
};
template <>
struct PairOf<BFloat16> {
  static constexpr int kPair = 2;
};

// Copies count elements, converted. Types differ only where one of them is float.
template <class To, class From>
static inline void convert_row(const From* from, int64_t stride, To* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    if (stride == 1) {
      __builtin_memcpy(to, from, count * sizeof(To));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
    }
  } else if constexpr (std::is_same_v<To, Float16>) {
    store_row(from, to, count);  // results only, whose stride is 1
  } else if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) store(to + i, load(from[i * stride]));
  } else if constexpr (std::is_same_v<From, Float16>) {
    load_row(from, to, count);
  } else {
    for (int64_t i = 0; i < count; ++i) store(to + i, load(from[i]));
  }
}

// Rows picked from a matrix, as [count][columns].
template <class To, class From>
static inline void convert_rows(const MatrixView& matrix, const int64_t* pick, int64_t first,
                                int64_t count, int64_t columns, To* to) {
  const From* data = static_cast<const From*>(matrix.data);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = pick ? pick[first + r] : first + r;
    convert_row(data + row * matrix.row_stride, matrix.column_stride, to + r * columns, columns);
  }
}

// [rows][columns] -> the panel whose k runs over the columns and whose n are the rows, zero beyond
// them: in words of kPair elements that is a transposition.
template <class T>
static inline void panel_of_columns(const T* from, int64_t rows, int64_t columns, int64_t n,
                                    T* to) {
  constexpr int kPair = PairOf<T>::kPair;
  struct Word {
    T elements[kPair];
  };
  const int64_t words = columns / kPair;
  constexpr int64_t kBlock = 16;  // a cache line of words from each row, 16 rows at a time
  for (int64_t w = 0; w < words; w += kBlock) {
    const int64_t stop = w + kBlock < words ? w + kBlock : words;
    for (int64_t r = 0; r < n; r += kBlock) {
      for (int64_t i = w; i < stop; ++i) {
        for (int64_t j = r; j < r + kBlock; ++j) {
          Word word = {};
          if (j < rows) __builtin_memcpy(&word, from + j * columns + i * kPair, sizeof(word));
          __builtin_memcpy(to + (i * n + j) * kPair, &word, sizeof(word));
        }
      }
    }
  }
}

// n columns of [rows][columns] from column `first` -> the panel whose k runs over `padded` rows,
// zero beyond `rows` and beyond `columns`.
template <class T>
static inline void panel_of_rows(const T* from, int64_t rows, int64_t padded, int64_t columns,
                                 int64_t first, int64_t n, T* to) {
  constexpr int kPair = PairOf<T>::kPair;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t have = r < rows ? (columns - first < n ? columns - first : n) : 0;
    T* out = to + (r / kPair) * n * kPair + r % kPair;
    for (int64_t c = 0; c < have; ++c) out[c * kPair] = from[r * columns + first + c];
    for (int64_t c = have; c < n; ++c) out[c * kPair] = T{};
  }
}

// [rows][columns] -> [columns][ld], zero in [rows, ld).
template <class T>
static inline void transpose(const T* from, int64_t from_ld, int64_t rows, int64_t columns, T* to,
                             int64_t ld) {
  constexpr int64_t kBlock = 16;
  for (int64_t c = 0; c < columns; c += kBlock) {
    const int64_t stop = c + kBlock < columns ? c + kBlock : columns;
    for (int64_t r = 0; r < ld; r += kBlock) {
      const int64_t end = r + kBlock < ld ? r + kBlock : ld;
      for (int64_t i = c; i < stop; ++i) {
        for (int64_t j = r; j < end; ++j) to[i * ld + j] = j < rows ? from[j * from_ld + i] : T{};
      }
    }
  }
}

// The gradient tile [m][n], rounded to T, as rows with stride ld and as a panel over the tile's
// rows; either may be null.
template <class T>
static inline void store_gradient(const typename ValueOf<T>::type* tile, int64_t m, int64_t n,
                                  T* rows, int64_t ld, T* panel) {
  if (rows) {
    for (int64_t v = 0; v < m; ++v) {
      for (int64_t c = 0; c < n; ++c) store(rows + v * ld + c, tile[v * n + c]);
    }
  }
  if (panel) {
    constexpr int kPair = PairOf<T>::kPair;
    for (int64_t v = 0; v < m; v += kPair) {
      for (int64_t c = 0; c < n; ++c) {
        for (int i = 0; i < kPair; ++i) {
          store(panel + (v * n + c * kPair) + i, tile[(v + i) * n + c]);
        }
      }
    }
  }
}
