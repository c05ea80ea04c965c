// What the kernels on a chunk of logits share: a warp takes a row, its lanes neighbouring columns.
#pragma once

#include "common/cuda/device.cuh"
#include "perplexity/perplexity.h"

namespace longrope::cuda {

constexpr int kRowsPerBlock = 8;  // warps

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
}

// A warp for each of `rows` rows.
template <typename... Parameters, typename... Arguments>
void launch_rows(const char* name, void (*kernel)(Parameters...), int64_t rows, void* stream,
                 const Arguments&... arguments) {
  launch(name, kernel, ceil_div<int64_t>(rows, kRowsPerBlock), 32 * kRowsPerBlock, 0,
         static_cast<cudaStream_t>(stream), arguments...);
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline bool rows_are_packed(const void* data, int64_t row_stride) {
  return is_aligned(data) && row_stride % 4 == 0;
}

// A logit after the softcap, if there is one, and the softcap's slope there.
struct Capped {
  float logit, slope;

  __device__ __forceinline__ Capped(float x, float cap) : logit(x), slope(1.0f) {
    if (cap == 0.0f) return;
    const float t = tanhf(x / cap);
    logit = cap * t;
    slope = 1.0f - t * t;
  }
};

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

// Writes what for_columns has made of four columns, rounded to T.
template <typename T>
__device__ __forceinline__ void store_columns(T* out, const float (&x)[4], int count, bool packed) {
  if (packed && count == 4) {
    store(out, pack<T>(x));
  } else {
    for (int i = 0; i < count; ++i) out[i] = from_float<T>(x[i]);
  }
}

}  // namespace longrope::cuda
