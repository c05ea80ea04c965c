// Every instruction that C++ has no words for, each wrapper beside its plain C++ twin.
//
// nvcc compiles the instruction; any other compiler compiles the twin, which the tests run on the
// CPU (tests/emulation). Kernels use these names only. The trailing Site is empty for nvcc and
// tells the twin where in the kernel it was called.
#pragma once

#include <cstdint>

#include "common/cuda/twin.cuh"

namespace longrope::cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

#ifdef __CUDACC__
// The 32-bit address that shared-memory instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// ---- barriers -----------------------------------------------------------------------------------

// Every thread of the block that has not exited.
__device__ __forceinline__ void sync_threads(Site site = Site::here()) {
#ifdef __CUDACC__
  __syncthreads();
#else
  emulation::join_block("__syncthreads", 0, 0, true, site);
#endif
}

// `threads` (a multiple of 32) threads of the block, counted by barrier `id` (1 .. 15).
__device__ __forceinline__ void bar_sync(int id, int threads, Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::join_block("bar.sync", id, threads, true, site);
#endif
}

// The same without waiting.
__device__ __forceinline__ void bar_arrive(int id, int threads, Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::join_block("bar.arrive", id, threads, false, site);
#endif
}

__device__ __forceinline__ void sync_warp(uint32_t mask = kAllLanes, Site site = Site::here()) {
#ifdef __CUDACC__
  __syncwarp(mask);
#else
  uint32_t nothing = 0;
  emulation::join_warp("__syncwarp", mask, &nothing, [](void**, uint32_t) {}, site);
#endif
}

// ---- exchange between the lanes of a warp -------------------------------------------------------
// `width` (a power of two up to 32) cuts the warp into groups that exchange among themselves. A
// lane without a source keeps its value; a source that does not take part gives poison.

template <typename T>
__device__ __forceinline__ T shfl(uint32_t mask, T value, int source, int width = 32,
                                  Site site = Site::here()) {
#ifdef __CUDACC__
  return __shfl_sync(mask, value, source, width);
#else
  return twin::shuffle("__shfl_sync", mask, value, site,
                       [=](int lane) { return (lane & -width) + (source & (width - 1)); });
#endif
}

template <typename T>
__device__ __forceinline__ T shfl_xor(uint32_t mask, T value, int lane_mask, int width = 32,
                                      Site site = Site::here()) {
#ifdef __CUDACC__
  return __shfl_xor_sync(mask, value, lane_mask, width);
#else
  return twin::shuffle("__shfl_xor_sync", mask, value, site, [=](int lane) {
    const int source = lane ^ lane_mask;
    return source < (lane & -width) + width ? source : lane;
  });
#endif
}

template <typename T>
__device__ __forceinline__ T shfl_up(uint32_t mask, T value, int delta, int width = 32,
                                     Site site = Site::here()) {
#ifdef __CUDACC__
  return __shfl_up_sync(mask, value, delta, width);
#else
  return twin::shuffle("__shfl_up_sync", mask, value, site, [=](int lane) {
    return lane - delta >= (lane & -width) ? lane - delta : lane;
  });
#endif
}

template <typename T>
__device__ __forceinline__ T shfl_down(uint32_t mask, T value, int delta, int width = 32,
                                       Site site = Site::here()) {
#ifdef __CUDACC__
  return __shfl_down_sync(mask, value, delta, width);
#else
  return twin::shuffle("__shfl_down_sync", mask, value, site, [=](int lane) {
    return lane + delta < (lane & -width) + width ? lane + delta : lane;
  });
#endif
}

// Bit i: the predicate of lane i.
__device__ __forceinline__ uint32_t ballot(uint32_t mask, bool predicate,
                                           Site site = Site::here()) {
#ifdef __CUDACC__
  return __ballot_sync(mask, predicate);
#else
  return twin::vote("__ballot_sync", mask, predicate, site).yes;
#endif
}

__device__ __forceinline__ bool any(uint32_t mask, bool predicate, Site site = Site::here()) {
#ifdef __CUDACC__
  return __any_sync(mask, predicate);
#else
  return twin::vote("__any_sync", mask, predicate, site).yes != 0;
#endif
}

__device__ __forceinline__ bool all(uint32_t mask, bool predicate, Site site = Site::here()) {
#ifdef __CUDACC__
  return __all_sync(mask, predicate);
#else
  return twin::vote("__all_sync", mask, predicate, site).no == 0;
#endif
}

// ---- asynchronous copies to shared memory -------------------------------------------------------

// 16 bytes; both addresses are aligned to 16. Unless the source `exists` it is not touched, may be
// any address, and zeros are written: by a predicate of the machine's instruction, where a number
// of bytes that may also lie between 0 and 16 takes six more instructions.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool exists = true,
                                            Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred absent;\nsetp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, absent;\n}" ::"r"(shared_address(shared)),
      "l"(global), "r"(static_cast<uint32_t>(exists))
      : "memory");
#else
  emulation::copy_async(shared, global, 16, exists ? 16 : 0, site);
#endif
}

// Closes the group of the copies that this thread has issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits until at most kPending of this thread's latest groups are under way. Other threads see the
// copies after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulation::wait_copies(kPending);
#endif
}

// Asks for the line of an address in global memory, to the second-level cache. A hint: nothing is
// read.
__device__ __forceinline__ void prefetch_l2(const void* address) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// ---- tensor cores -------------------------------------------------------------------------------

// kCount (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory. Lane 8 m + r gives the
// address of row r of matrix m (16 bytes, aligned). Lane t receives elements (t / 4, 2 (t % 4)) and
// the next of matrix m in registers[m]; with kTranspose of the transposed matrix.
template <bool kTranspose, int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[kCount], const void* row,
                                         Site site = Site::here()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 4 && kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2 && kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  }
#else
  twin::load_matrices(registers, kCount, kTranspose, row, site);
#endif
}

// d = a b + c for a 16x16 (row major) and b 16x8 (column major) of T = bf16 or f16, c and d 16x8 in
// float. With group = lane / 4 and pair = 2 (lane % 4), a lane holds
//   a[0] (group, pair)  a[1] (group + 8, pair)  a[2] (group, pair + 8)  a[3] (group + 8, pair + 8)
//   b[0] (pair, group)  b[1] (pair + 8, group)  c[0], c[1] (group, pair)  c[2], c[3] (group + 8,
//   pair)
// each register with the element named and the next one, along columns of a and c and rows of b.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2], const float (&c)[4],
                                            Site site = Site::here()) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    static_assert(std::is_same_v<T, f16>, "mma_16x8x16 takes bf16 or f16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
#else
  twin::multiply_16x8x16<T>(d, a, b, c, site);
#endif
}

// ---- arithmetic ---------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bf16 x) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#else
  return twin::to_float(x);
#endif
}

__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return twin::to_float(x);
#endif
}

// Rounds to the nearest T, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
#ifdef __CUDACC__
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    return twin::to_bf16(x);
#endif
  } else {
    static_assert(std::is_same_v<T, f16>, "from_float gives float, bf16 or f16");
#ifdef __CUDACC__
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    return twin::to_f16(x);
#endif
  }
}

// Two T side by side, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, f16>, "pack_pair packs bf16 or f16");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

// The two T of a pair.
template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(pair & 0xFFFF)});
  high = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// sin and cos of pi x.
__device__ __forceinline__ void sincos_pi(float x, float& sin, float& cos) {
#ifdef __CUDACC__
  sincospif(x, &sin, &cos);
#else
  constexpr double kPi = 3.141592653589793;
  sin = static_cast<float>(std::sin(kPi * x));
  cos = static_cast<float>(std::cos(kPi * x));
#endif
}

// 1 / x within 1 ulp; of subnormal numbers infinite, subnormal results are zero.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = 1.0f / (std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
#endif
}

// 2^x within 2 ulp; subnormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

}  // namespace longrope::cuda
