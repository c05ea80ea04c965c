// What the kernels on a chunk of logits share: a warp takes a row, its lanes neighbouring columns.
#pragma once

#include "common/cuda/device.cuh"
#include "perplexity/perplexity.h"

namespace longrope::cuda {

constexpr int kRowsPerBlock = 8;  // warps

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
}

inline dim3 blocks_of_rows(int64_t rows) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kRowsPerBlock)));
}

inline bool rows_are_packed(const float* logits, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(logits) % 16 == 0 && row_stride % 4 == 0;
}

// Calls f(column, float (&values)[4], count) for the columns of a row in fours, kFlight of them
// loaded before the first is used. Values from `count` on are padding.
template <int kFlight, typename F>
__device__ __forceinline__ void for_columns(const LogitsChunk& chunk, int64_t row, bool packed,
                                            const F& f) {
  const float* logits = chunk.logits + row * chunk.row_stride;
  const int columns = static_cast<int>(chunk.columns), lane = threadIdx.x % 32;
  for (int begin = 4 * lane; begin < columns; begin += 128 * kFlight) {
    float values[kFlight][4];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      const int column = begin + 128 * j;
      if (packed && column + 4 <= columns) {
        unpack(load<4>(logits + column), values[j]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[j][i] = column + i < columns ? logits[column + i] : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      const int column = begin + 128 * j;
      if (column < columns) f(column, values[j], columns - column < 4 ? columns - column : 4);
    }
  }
}

}  // namespace longrope::cuda
