// Tiles of float32 elements in shared memory and the two products over them. A warp takes
// kRowsOfWarp rows of one operand at a time, its lanes the 32 rows of the other.
#pragma once

#include "attention/cuda/softmax.cuh"
#include "attention/cuda/visible.cuh"

namespace longrope::cuda {

constexpr int kFloatThreads = 128;
constexpr int kRowsOfWarp = 4;  // what is read of the other operand serves four
constexpr int kFloatRows = kFloatThreads / 32 * kRowsOfWarp;  // of a block
constexpr int kFloatKeys = 32;                                // of a tile, one for every lane
constexpr int kFloatColumns = kMaxHeadDim / 32;               // of a lane

// Odd: the elements of one column lie in different banks.
constexpr __host__ __device__ int float_stride(int head_dim) { return head_dim | 1; }

// Reads [rows, head_dim] into `tile`, row r from row_at(r), zero where that gives nullptr.
template <typename RowAt>
__device__ __forceinline__ void read_rows(float* tile, int rows, int head_dim,
                                          const RowAt& row_at) {
  const int stride = float_stride(head_dim);
  for (int r = threadIdx.x / 32; r < rows; r += kFloatThreads / 32) {
    const float* row = row_at(r);
    for (int c = threadIdx.x % 32; c < head_dim; c += 32) {
      tile[r * stride + c] = row ? row[c] : 0.0f;
    }
  }
}

// s[r] = row r of the warp's rows times the lane's row.
__device__ __forceinline__ void products(float (&s)[kRowsOfWarp], const float* rows,
                                         const float* lane_row, int head_dim) {
  constexpr int kTerms = 16;  // of the sums that are added up
  const int stride = float_stride(head_dim);
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) s[r] = 0.0f;
  for (int begin = 0; begin < head_dim; begin += kTerms) {
    float part[kRowsOfWarp] = {};
    const int end = begin + kTerms < head_dim ? begin + kTerms : head_dim;
    for (int d = begin; d < end; ++d) {
      const float x = lane_row[d];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) part[r] = fmaf(rows[r * stride + d], x, part[r]);
    }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) s[r] += part[r];
  }
}

// c[r][i] = factor[r] c[r][i] + the sum over the 32 rows of `tile` of weights[r] times column 32 i
// + lane.
__device__ __forceinline__ void add_weighted(float (&c)[kRowsOfWarp][kFloatColumns],
                                             const float* weights, const float* tile, int head_dim,
                                             const float (&factor)[kRowsOfWarp]) {
  const int stride = float_stride(head_dim), lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kFloatColumns; ++i) {
    const int column = 32 * i + lane;
    if (column >= head_dim) break;
    float part[kRowsOfWarp] = {};
#pragma unroll 8
    for (int key = 0; key < kFloatKeys; ++key) {
      const float x = tile[key * stride + column];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        part[r] = fmaf(weights[r * kFloatKeys + key], x, part[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) c[r][i] = fmaf(c[r][i], factor[r], part[r]);
  }
}

__device__ __forceinline__ void add_weighted(float (&c)[kRowsOfWarp][kFloatColumns],
                                             const float* weights, const float* tile,
                                             int head_dim) {
  const float ones[kRowsOfWarp] = {1.0f, 1.0f, 1.0f, 1.0f};
  add_weighted(c, weights, tile, head_dim, ones);
}

// The columns of a warp's row times `factor`.
__device__ __forceinline__ void write_row(float* row, const float (&c)[kFloatColumns], float factor,
                                          int head_dim) {
#pragma unroll
  for (int i = 0; i < kFloatColumns; ++i) {
    const int column = 32 * i + static_cast<int>(threadIdx.x % 32);
    if (column < head_dim) row[column] = c[i] * factor;
  }
}

// The score that a product q . k stands for. Natural units and expf: powers of two would round each
// score once more, and exp2f is off by 2 ulp where expf is by 1.
struct FloatScore {
  float scale, cap;

  __device__ __forceinline__ explicit FloatScore(const AttentionParams& p)
      : scale(static_cast<float>(p.scale)), cap(static_cast<float>(p.softcap)) {}

  __device__ __forceinline__ float of(float product) const {
    const float x = scale * product;
    return cap != 0.0f ? cap * tanhf(x / cap) : x;
  }
};

}  // namespace longrope::cuda
