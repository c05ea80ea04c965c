// What every kernel uses: 16-byte memory accesses, conversions, reductions, shared arrays, launch.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "common/cuda/ptx.cuh"
#include "common/cuda/types.cuh"
#include "common/dtype.h"
#include "common/numbers.h"

// States the most registers that `kernel` may use; .ci/nvcc_check.py reads it from the source and
// holds ptxas to it. Spills fail too, unless a third argument allows so many bytes of them.
#define LONGROPE_MAX_REGISTERS(...)

// A shared array of the block, `type name[count]`, 16-byte aligned, unwritten.
#ifdef __CUDACC__
#define LONGROPE_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#else
#define LONGROPE_SHARED(type, name, count)   \
  static char name##_tag;                    \
  auto& name = *static_cast<type(*)[count]>( \
      ::emulation::static_shared(static_cast<const void*>(&name##_tag), sizeof(type) * (count)))
#endif

namespace longrope::cuda {

// The shared memory that the launch asked for, 128-byte aligned, unwritten.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char longrope_dynamic_shared[];
  return longrope_dynamic_shared;
#else
  return static_cast<unsigned char*>(emulation::dynamic_shared());
#endif
}

// kCount neighbours with one instruction; the address is aligned to all of them.
template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load(const T* address, Site site = Site::here()) {
#ifndef __CUDACC__
  emulation::check_aligned(address, sizeof(Pack<T, kCount>), "load", site);
#endif
  return *reinterpret_cast<const Pack<T, kCount>*>(address);
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* address, const Pack<T, kCount>& pack,
                                      Site site = Site::here()) {
#ifndef __CUDACC__
  emulation::check_aligned(address, sizeof(Pack<T, kCount>), "store", site);
#endif
  *reinterpret_cast<Pack<T, kCount>*>(address) = pack;
}

// The elements of a pack in float, and back with one rounding. 16-bit elements go by twos, as the
// conversion instructions do.
template <typename T, int kCount>
__device__ __forceinline__ void unpack(const Pack<T, kCount>& pack, float (&values)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    uint32_t words[kCount / 2];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      unpack_pair<T>(words[i], values[2 * i], values[2 * i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = to_float(pack.values[i]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> pack(const float (&values)[kCount]) {
  Pack<T, kCount> result;
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    }
    memcpy(&result, words, sizeof(result));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.values[i] = from_float<T>(values[i]);
  }
  return result;
}

// Over groups of `width` lanes of a full warp; every lane receives the result. Butterflies: the
// order of the additions is the same in every lane and in every run.
template <typename T>
__device__ __forceinline__ T warp_sum(T value, int width = 32, Site site = Site::here()) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value += shfl_xor(kAllLanes, value, distance, 32, site);
  }
  return value;
}

// Of numbers, one instruction for each; NaN only where every lane has it.
__device__ __forceinline__ float warp_max(float value, int width = 32, Site site = Site::here()) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, shfl_xor(kAllLanes, value, distance, 32, site));
  }
  return value;
}

// Shared memory of a block: what every kernel gets, and what every chip from sm_80 on grants to one
// that asks for it (CUDA programming guide, compute capabilities: 99 KiB on 8.6, 8.9 and 12.0, 163
// on 8.0, 227 on 9.0 and 10.0). A kernel for all of them keeps within that, by static_assert where
// its size is known.
constexpr size_t kSharedBytesUnasked = 48 << 10;
constexpr size_t kSharedBytesEverywhere = 99 << 10;

// What the device at hand grants.
inline size_t most_shared_bytes() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return kSharedBytesEverywhere;
  }
  return static_cast<size_t>(bytes);
#else
  return emulation::most_shared_bytes();
#endif
}

// Ten times the major compute capability of the device at hand, plus the minor.
inline int capability() {
#ifdef __CUDACC__
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  int found = device < kDevices ? known[device].load() : 0;
  int major = 0, minor = 0;
  if (found == 0 &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    found = 10 * major + minor;
    if (device < kDevices) known[device] = found;
  }
  return found;
#else
  return emulation::capability();
#endif
}

// Blocks along x and y, of which any device takes so many.
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kMostBlocksAlongY = (1 << 16) - 1;
struct Grid {
  Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
  int64_t x, y;
};

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...). Throws std::runtime_error with the
// kernel's name when the launch is refused.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  const size_t most = shared_bytes > kSharedBytesUnasked ? most_shared_bytes() : shared_bytes;
  if (shared_bytes > most) {
    throw std::runtime_error(std::string(name) + ": expected a device whose blocks get " +
                             std::to_string(shared_bytes) + " bytes of shared memory, got " +
                             std::to_string(most));
  }
  if (grid.x > kMostBlocks || grid.y > kMostBlocksAlongY) {
    throw std::runtime_error(std::string(name) + ": expected at most " +
                             std::to_string(kMostBlocks) + " by " +
                             std::to_string(kMostBlocksAlongY) + " blocks, got " +
                             std::to_string(grid.x) + " by " + std::to_string(grid.y));
  }
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedBytesUnasked) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
  }
#else
  (void)stream;
  emulation::run_grid({name,
                       {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1},
                       {static_cast<unsigned>(threads), 1, 1},
                       shared_bytes},
                      [&] { kernel(arguments...); });
#endif
}

// Calls f with a value of the element type that `dtype` says.
template <typename F>
auto for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
    default:
      throw std::invalid_argument("dtype: expected float32, bfloat16 or float16 on CUDA");
  }
}

}  // namespace longrope::cuda
