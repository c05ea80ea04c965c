// Makes the maps that copy_box (sm90.cuh) takes. Host code.
#pragma once

#include "common/cuda/sm90.cuh"

namespace longrope::cuda {

// A tensor of 16-bit elements, innermost dimension first; strides in bytes, of all but the first
// dimension: multiples of 16, as the address is.
struct TensorLayout {
  const void* data;
  int64_t sizes[4];
  int64_t strides[3];
};

constexpr int kBoxColumns = 64;  // 128 bytes: the widest row whose units change places

// Of boxes of `rows` rows (the second dimension) and 64 columns.
inline TensorMap tensor_map(const TensorLayout& x, int rows) {
#ifdef __CUDACC__
  // Through the runtime: linking with the driver's library would tie the extension to machines that
  // have one.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("cuTensorMapEncodeTiled: expected a driver of CUDA 12 or later");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(x.sizes[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(x.strides[i]);
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  TensorMap map;
  // Elements are copied as they are: which 16-bit type they have does not matter.
  const CUresult error =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(x.data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: refused with error " +
                             std::to_string(static_cast<int>(error)));
  }
  return map;
#else
  return emulation::tensor_map(x.data, x.sizes, x.strides, rows);
#endif
}

}  // namespace longrope::cuda
