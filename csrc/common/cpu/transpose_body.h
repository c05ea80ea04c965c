// Transposes matrices (no include guard: part of a body).

// y[column * y_stride + row] = x[row * x_stride + column] for a few rows and columns.
template <typename E>
inline void transpose_few(const E* x, int64_t x_stride, int64_t rows, int64_t columns, E* y,
                          int64_t y_stride) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      store_as(y + c * y_stride + r, load_as<E>(x + r * x_stride + c));
    }
  }
}

// Floats four by four in registers.
inline void transpose_four(const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  using Four = Lanes<4>::Floats;
  const Four a = load_as<Four>(x), b = load_as<Four>(x + x_stride);
  const Four c = load_as<Four>(x + 2 * x_stride), d = load_as<Four>(x + 3 * x_stride);
  const Four ab_low = LONGROPE_SHUFFLE(a, b, 0, 4, 1, 5);
  const Four ab_high = LONGROPE_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd_low = LONGROPE_SHUFFLE(c, d, 0, 4, 1, 5);
  const Four cd_high = LONGROPE_SHUFFLE(c, d, 2, 6, 3, 7);
  store_as(y, LONGROPE_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
  store_as(y + y_stride, LONGROPE_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
  store_as(y + 2 * y_stride, LONGROPE_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
  store_as(y + 3 * y_stride, LONGROPE_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
}

inline void transpose_few(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y,
                          int64_t y_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      transpose_four(x + r * x_stride + c, x_stride, y + c * y_stride + r, y_stride);
    }
    transpose_few<float>(x + r * x_stride + c, x_stride, 4, columns - c, y + c * y_stride + r,
                         y_stride);
  }
  transpose_few<float>(x + r * x_stride, x_stride, rows - r, columns, y + r, y_stride);
}

// [rows, columns] with row stride x_stride -> [columns, filled] with row stride y_stride, zero in
// [rows, filled).
template <typename E>
inline void transpose(const E* x, int64_t x_stride, int64_t rows, int64_t columns, E* y,
                      int64_t y_stride, int64_t filled = 0) {
  constexpr int64_t kBlock = 16;  // each row's cache line of floats, and each column's
  for (int64_t c = 0; c < columns; c += kBlock) {
    const int64_t wide = columns - c < kBlock ? columns - c : kBlock;
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t tall = rows - r < kBlock ? rows - r : kBlock;
      const E* const from = x + r * x_stride + c;
      E* const to = y + c * y_stride + r;
      if (wide == kBlock && tall == kBlock) {
        transpose_few(from, x_stride, kBlock, kBlock, to, y_stride);  // sizes that are constants
      } else {
        transpose_few(from, x_stride, tall, wide, to, y_stride);
      }
    }
    for (int64_t i = c; i < c + wide; ++i) {
      for (int64_t r = rows; r < filled; ++r) y[i * y_stride + r] = E{};
    }
  }
}
