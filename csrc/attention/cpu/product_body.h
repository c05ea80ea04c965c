// Register-blocked matrix products (no include guard: part of a body).
//
// C[rows, columns] = A[rows, depth] B[depth, columns]: B lies in panels of kColumns columns,
// [panel][depth][kColumns], so that a panel stays in the first-level cache while the rows of A
// stream past it. A may lie either way round; its strides are template arguments, so that the
// addresses of a tile's rows are constants.

template <typename Real>
struct Tile {
  static constexpr int kVectors = 2;
  static constexpr int kColumns = kVectors * Vector<Real>::kLanes;
  // Rows of a full tile are kSteps * kStep; the last tile has fewer, a multiple of kStep. 12 x 2
  // (AVX-512, 32 registers) and 6 x 2 (AVX2, 16) accumulators hide the latency of the multiply-add.
  static constexpr int kStep = LONGROPE_ISA_BYTES == 64 ? 4 : 2;
  static constexpr int kSteps = LONGROPE_ISA_BYTES == 16 ? 2 : 3;
  static constexpr int kRows = kStep * kSteps;
};

enum class Update {
  kStore,     // C = A B
  kAdd,       // C = C + A B
  kScaleAdd,  // C = C * scale[row] + A B
};

template <Update kUpdate, int kRows, int kRowStride, int kDepthStride, typename Real>
inline void tile_product(int64_t depth, const Real* a, const Real* b, Real* c, int64_t c_stride,
                         const Real* scale) {
  using V = VectorOf<Real>;
  constexpr int kLanes = Vector<Real>::kLanes;
  constexpr int kVectors = Tile<Real>::kVectors;
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) sum[i][j] = V{};
  }
  for (int64_t p = 0; p < depth; ++p) {
    V column[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) column[j] = load_vector(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V row = broadcast(a[i * kRowStride]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sum[i][j] += row * column[j];
    }
    a += kDepthStride;
    b += kVectors * kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      Real* const y = c + i * c_stride + j * kLanes;
      if (kUpdate == Update::kStore) store_vector(y, sum[i][j]);
      if (kUpdate == Update::kAdd) store_vector(y, load_vector(y) + sum[i][j]);
      if (kUpdate == Update::kScaleAdd) store_vector(y, load_vector(y) * scale[i] + sum[i][j]);
    }
  }
}

// A whose rows lie in groups of a tile's rows, [depth][group] within: contiguous broadcasts.
template <Update kUpdate, typename Real>
inline void grouped_product(int rows, int64_t depth, const Real* a, const Real* b, Real* c,
                            int64_t c_stride, const Real* scale = nullptr) {
  constexpr int kStep = Tile<Real>::kStep;
  switch (rows / kStep) {
    case 1:
      return tile_product<kUpdate, kStep, 1, kStep>(depth, a, b, c, c_stride, scale);
    case 2:
      return tile_product<kUpdate, 2 * kStep, 1, 2 * kStep>(depth, a, b, c, c_stride, scale);
    default:
      return tile_product<kUpdate, Tile<Real>::kRows, 1, Tile<Real>::kRows>(depth, a, b, c,
                                                                            c_stride, scale);
  }
}

// A with kRowStride elements between rows and kDepthStride between columns.
template <Update kUpdate, int kRowStride, int kDepthStride, typename Real>
inline void strided_product(int rows, int64_t depth, const Real* a, const Real* b, Real* c,
                            int64_t c_stride, const Real* scale = nullptr) {
  constexpr int kStep = Tile<Real>::kStep;
  switch (rows / kStep) {
    case 1:
      return tile_product<kUpdate, kStep, kRowStride, kDepthStride>(depth, a, b, c, c_stride,
                                                                    scale);
    case 2:
      return tile_product<kUpdate, 2 * kStep, kRowStride, kDepthStride>(depth, a, b, c, c_stride,
                                                                        scale);
    default:
      return tile_product<kUpdate, Tile<Real>::kRows, kRowStride, kDepthStride>(depth, a, b, c,
                                                                                c_stride, scale);
  }
}
