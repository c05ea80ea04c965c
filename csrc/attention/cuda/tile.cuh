// Tiles of 16-bit elements in shared memory and the two products of tensor cores over them.
#pragma once

#include "attention/cuda/visible.cuh"

namespace longrope::cuda {

// Elements from one row of a tile to the next. 16 bytes more than the row: the eight rows that an
// ldmatrix reads at once lie in different banks.
template <int kHeadDim>
constexpr int kTileStride = kHeadDim + 8;

// How kThreads threads (the block, or each warp by itself) copy tiles of kHeadDim columns: each
// takes every kLanes-th unit of 16 bytes of a row, from a column that is always the same, so that
// all it needs of a row is one address. Eight lanes read 128 bytes at once, a whole line of the
// cache; 96 columns are 12 units.
template <int kHeadDim, int kThreads>
struct CopyLanes {
  static constexpr int kLanes = kHeadDim % 64 == 0 ? 8 : 4;
  static constexpr int kRows = kThreads / kLanes;  // at once
  static constexpr int kUnits = kHeadDim / 8 / kLanes;

  const int row = static_cast<int>(threadIdx.x % kThreads) / kLanes;
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;

  // Begins to copy one row, of which `width` columns exist, from `source`, which points to this
  // thread's column: row `r` of `tile`. Zeros where it does not exist.
  template <typename T>
  __device__ __forceinline__ void copy(T* tile, int r, const T* source, int width,
                                       bool exists) const {
    T* const target = tile + (row + r) * kTileStride<kHeadDim> + column;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      const int offset = 8 * kLanes * j;
      cp_async_16(target + offset, source + offset, exists && column + offset < width);
    }
  }
};

// Copies keys (or values) of a head, tile by tile. A thread keeps the address of its part of the
// next row and adds the distance of two: what a 64-bit product for each copy would take is more
// than what the copies do.
template <int kKeys, int kHeadDim, int kThreads, typename T>
class KeySource {
 public:
  __device__ __forceinline__ KeySource(const AttentionParams& p, const AttentionTensor& x,
                                       const Head& head, int first)
      : next_(head.key<const T>(x, first + lanes_.row) + lanes_.column),
        step_(Lanes::kRows * x.token_stride),
        width_(static_cast<int>(read_columns(p))) {}

  // Begins to copy the next tile, of which keys [from, to) exist.
  __device__ __forceinline__ void copy(T* tile, int from, int to) {
    static_assert(kKeys % Lanes::kRows == 0, "every thread copies as many rows");
#pragma unroll
    for (int r = 0; r < kKeys; r += Lanes::kRows) {
      const int key = lanes_.row + r;
      lanes_.copy(tile, r, next_, width_, key >= from && key < to);
      next_ += step_;
    }
  }
  __device__ __forceinline__ void skip(int64_t elements) { next_ += elements; }

 private:
  using Lanes = CopyLanes<kHeadDim, kThreads>;
  const Lanes lanes_;
  const T* next_;
  const int64_t step_;
  const int width_;
};

// Copies rows of queries of a head, tile by tile: row r is query r / group of member r % group
// (visible.cuh). A thread steps from row to row without a division.
template <int kRows, int kHeadDim, int kThreads, typename T>
class RowSource {
 public:
  __device__ __forceinline__ RowSource(const AttentionParams& p, const AttentionTensor& x,
                                       const Head& head, int first)
      : at_(head.group, first + lanes_.row, Lanes::kRows),
        next_(head.row<const T>(x, first + lanes_.row) + lanes_.column),
        step_(at_.queries * x.token_stride + at_.members * x.head_stride),
        wrap_(x.token_stride - head.group * x.head_stride),
        width_(static_cast<int>(read_columns(p))) {}

  // Begins to copy the next tile, of which the first `count` rows exist.
  __device__ __forceinline__ void copy(T* tile, int count) {
    static_assert(kRows % Lanes::kRows == 0, "every thread copies as many rows");
#pragma unroll
    for (int r = 0; r < kRows; r += Lanes::kRows) {
      lanes_.copy(tile, r, next_, width_, lanes_.row + r < count);
      next_ += at_.step() ? step_ + wrap_ : step_;
    }
  }

 private:
  using Lanes = CopyLanes<kHeadDim, kThreads>;
  const Lanes lanes_;
  RowSteps at_;
  const T* next_;
  const int64_t step_, wrap_;
  const int width_;
};

// c[i][j] += rows [16 i, 16 i + 16) of `a` times rows [8 j, 8 j + 8) of `b`, transposed: both tiles
// [rows, kHeadDim]. The accumulators lie in the lanes as mma_16x8x16 says.
template <int kHeadDim, int kM, int kN, typename T>
__device__ __forceinline__ void multiply_transposed(float (&c)[kM][kN][4], const T* a, const T* b) {
  constexpr int kStride = kTileStride<kHeadDim>;
  static_assert(kN % 2 == 0, "two columns of matrices to one load");
  const int matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
  const T* a_lane = a + (matrix % 2 * 8 + line) * kStride + matrix / 2 * 8;
  const T* b_lane = b + (matrix / 2 * 8 + line) * kStride + matrix % 2 * 8;
#pragma unroll 4
  for (int depth = 0; depth < kHeadDim; depth += 16) {
    uint32_t left[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) ldmatrix<false>(left[i], a_lane + 16 * i * kStride + depth);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t right[4];
      ldmatrix<false>(right, b_lane + 8 * j * kStride + depth);
      const uint32_t one[2] = {right[0], right[1]}, two[2] = {right[2], right[3]};
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_16x8x16<T>(c[i][j], left[i], one, c[i][j]);
        mma_16x8x16<T>(c[i][j + 1], left[i], two, c[i][j + 1]);
      }
    }
  }
}

// c[i][j] += left[i] times columns [8 j, 8 j + 8) of `b`, a tile [16 kK, kHeadDim], whose first
// column b points to.
template <int kHeadDim, int kM, int kK, int kN, typename T>
__device__ __forceinline__ void multiply(float (&c)[kM][kN][4], const uint32_t (&left)[kM][kK][4],
                                         const T* b) {
  constexpr int kStride = kTileStride<kHeadDim>;
  static_assert(kN % 2 == 0, "two columns of matrices to one load");
  const int matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
  const T* b_lane = b + (matrix % 2 * 8 + line) * kStride + matrix / 2 * 8;
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t right[4];
      ldmatrix<true>(right, b_lane + 16 * k * kStride + 8 * j);
      const uint32_t one[2] = {right[0], right[1]}, two[2] = {right[2], right[3]};
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_16x8x16<T>(c[i][j], left[i][k], one, c[i][j]);
        mma_16x8x16<T>(c[i][j + 1], left[i][k], two, c[i][j + 1]);
      }
    }
  }
}

// Accumulators [16 rows, 16 kK columns] rounded to T as the left operand of the next product: two
// neighbouring accumulators hold what one of its registers does.
template <typename T, int kK>
__device__ __forceinline__ void round_to_left(const float (&c)[2 * kK][4],
                                              uint32_t (&left)[kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float (&pair)[4] = c[2 * k + r / 2];
      left[k][r] = pack_pair<T>(pair[r % 2 * 2], pair[r % 2 * 2 + 1]);
    }
  }
}

// Writes c times the factor of each row, rounded to T: row r of the 16 kM to row_at(r), unless that
// is nullptr, its first `columns` elements; `packed` if these rows are aligned to 16 bytes. Goes
// through `tile`, [16 kM, 8 kN] of which nobody but this warp has a need.
template <int kHeadDim, int kM, int kN, typename T, typename RowAt>
__device__ __forceinline__ void write_rows(T* tile, const float (&c)[kM][kN][4],
                                           const float (&factor)[kM][2], int columns, bool packed,
                                           const RowAt& row_at) {
  constexpr int kStride = kTileStride<kHeadDim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* row = tile + (16 * i + 8 * half + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float pair[2] = {c[i][j][2 * half] * factor[i][half],
                               c[i][j][2 * half + 1] * factor[i][half]};
        store(row + 8 * j, pack<T>(pair));
      }
    }
  }
  sync_warp();
  for (int i = lane; i < 16 * kM * kN; i += 32) {
    const int r = i / kN, column = i % kN * 8;
    T* row = column < columns ? row_at(r) : nullptr;
    if (row == nullptr) continue;
    const auto unit = load<8>(tile + r * kStride + column);
    if (packed) {
      store(row + column, unit);
    } else {
      for (int e = 0; e < 8 && column + e < columns; ++e) row[column + e] = unit.values[e];
    }
  }
}

}  // namespace longrope::cuda
