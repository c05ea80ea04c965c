// The words of CUDA C++ that kernels use, for a plain C++ compiler. csrc/common/cuda/device.cuh
// includes this file where nvcc is not the compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/runtime.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

// Threads take turns only at the primitives, so these are atomic as they stand.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = value > old ? value : old;
  return old;
}

template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

inline void __threadfence() {}
