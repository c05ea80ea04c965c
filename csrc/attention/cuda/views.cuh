// What the attention kernels share about their tensors.
#pragma once

#include "attention/attention.h"
#include "common/cuda/device.cuh"

namespace longrope::cuda {

// Whether every row of `x` begins at a multiple of 16 bytes.
template <typename T>
bool packs(const AttentionTensor& x) {
  constexpr int64_t kCount = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % kCount == 0 &&
         x.head_stride % kCount == 0 && x.token_stride % kCount == 0;
}

// Columns of a row that the kernels read: those of head_dim, and zeros behind 16-bit ones up to a
// multiple of 16 bytes (attention.cu sees to them).
inline __host__ __device__ int64_t read_columns(const AttentionParams& p) {
  return p.dtype == DType::kFloat32 ? p.head_dim : (p.head_dim + 7) / 8 * 8;
}

// [head_dim] row of (batch row, head, token).
template <typename T>
__device__ __forceinline__ T* row_of(const AttentionTensor& x, int64_t row, int64_t head,
                                     int64_t token) {
  return static_cast<T*>(x.data) + row * x.batch_stride + head * x.head_stride +
         token * x.token_stride;
}

}  // namespace longrope::cuda
