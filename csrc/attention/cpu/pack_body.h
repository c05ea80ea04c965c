// From tensors of any element type and stride to the packed operands of the products (no include
// guard: part of a body). Whatever is out of bounds is packed as zero, never read.

template <typename Real>
inline void rotate_row(Real* x, const Real* cos, const Real* sin, int64_t pairs, bool interleaved) {
  if (interleaved) {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      const Real x1 = x[2 * i], x2 = x[2 * i + 1];
      x[2 * i] = x1 * cos[i] - x2 * sin[i];
      x[2 * i + 1] = x2 * cos[i] + x1 * sin[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      const Real x1 = x[i], x2 = x[i + pairs];
      x[i] = x1 * cos[i] - x2 * sin[i];
      x[i + pairs] = x2 * cos[i] + x1 * sin[i];
    }
  }
}

// To the nearest of T, in place.
template <typename T>
inline void round_row(RealOf<T>* x, int64_t count) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // What arithmetic makes of NaN has no bits that this would carry from.
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + i, sizeof(bits));
      bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
      __builtin_memcpy(x + i, &bits, sizeof(bits));
    }
  } else if constexpr (std::is_same_v<T, Float16>) {
    Float16 rounded[kMaxHeadDim];
    store_row(x, rounded, count);
    load_row(rounded, x, count);
  }
}

// The tokens of one head of one row of the batch, [tokens, head_dim].
template <typename T>
struct Tokens {
  const T* data;
  int64_t token_stride, head_dim;
  AttentionTable table;

  Tokens(const AttentionTensor& x, const AttentionTable& table, int64_t head_dim, int64_t b,
         int64_t head)
      : data(static_cast<const T*>(x.data) + b * x.batch_stride + head * x.head_stride),
        token_stride(x.token_stride),
        head_dim(head_dim),
        table(table) {}

  bool turns() const { return table.cos; }

  // Turned tokens are rounded to T, as they would be in memory.
  void read(int64_t token, RealOf<T>* row) const {
    using Real = RealOf<T>;
    load_row(data + token * token_stride, row, head_dim);
    if (!turns()) return;
    const int64_t at = (token - table.first) * table.pairs;
    rotate_row(row, static_cast<const Real*>(table.cos) + at,
               static_cast<const Real*>(table.sin) + at, table.pairs, table.interleaved);
    round_row<T>(row, 2 * table.pairs);
  }
};

// The transpose of tokens [first, first + count) in panels of kColumns tokens,
// [panel][head_dim][kColumns]; the last panel is filled up with zeros. row: [kColumns, head_dim].
template <typename T>
inline void pack_transposed(const Tokens<T>& x, int64_t first, int64_t count, RealOf<T>* panels,
                            RealOf<T>* rows) {
  using Real = RealOf<T>;
  constexpr int64_t kColumns = Tile<Real>::kColumns;
  for (int64_t t = 0; t < count; t += kColumns) {
    const int64_t here = count - t < kColumns ? count - t : kColumns;
    for (int64_t i = 0; i < here; ++i) x.read(first + t + i, rows + i * x.head_dim);
    for (int64_t i = here * x.head_dim; i < kColumns * x.head_dim; ++i) rows[i] = 0;
    transpose(rows, x.head_dim, kColumns, x.head_dim, panels + t * x.head_dim, kColumns);
  }
}

// Row `index` of a matrix in panels of kColumns columns, [panel][panel_rows][kColumns]; the last
// panel is filled up with zeros.
template <typename Real>
inline void pack_row(const Real* row, int64_t columns, int64_t index, int64_t panel_rows,
                     Real* panels) {
  constexpr int64_t kColumns = Tile<Real>::kColumns;
  for (int64_t c = 0; c < columns; c += kColumns) {
    Real* const y = panels + c * panel_rows + index * kColumns;
    const int64_t here = columns - c < kColumns ? columns - c : kColumns;
    for (int64_t i = 0; i < here; ++i) y[i] = row[c + i];
    for (int64_t i = here; i < kColumns; ++i) y[i] = 0;
  }
}

// Rows in groups of a tile's rows, [group][columns][rows of the group]; `rows` a multiple of kStep.
template <typename Real>
inline void pack_groups(const Real* x, int64_t rows, int64_t columns, Real* groups) {
  constexpr int64_t kRows = Tile<Real>::kRows;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t here = rows - r < kRows ? rows - r : kRows;
    Real* const y = groups + r * columns;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < here; ++i) y[c * here + i] = x[(r + i) * columns + c];
    }
  }
}
