// The compiler at hand (nvcc, or a plain C++ compiler for the tests) and the 16-bit element types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation/cuda.h"
#endif

namespace longrope::cuda {

#ifdef __CUDACC__
// Costs nothing; the twins of ptx.cuh take the caller's file and line here.
struct Site {
  static constexpr __device__ Site here() { return {}; }
};
#else
using emulation::Site;
#endif

// Storage only; ptx.cuh converts.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// kCount elements that one instruction loads or stores.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

}  // namespace longrope::cuda
