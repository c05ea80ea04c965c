// The instructions of compute capability 9.0 alone (sm_90a), in the manner of ptx.cuh: memory
// barriers that count bytes, copies of tensor tiles, and products of a warpgroup, which is four
// warps of which the first has a multiple of four as its number. Their twins are in
// tests/emulation/warpgroup.cpp.
#pragma once

#include "common/cuda/device.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "emulation/warpgroup.h"
#endif

namespace longrope::cuda {

constexpr int kWarpgroup = 128;  // threads

// ---- memory barriers ----------------------------------------------------------------------------
// A phase of a barrier ends when as many arrivals have come as it was made for and as many bytes as
// were announced. Phases are told apart by their parity, which is 0 for the first.

// By one thread; the others may use the barrier after publish_barriers and a __syncthreads.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals,
                                             Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#else
  emulation::init_barrier(barrier, arrivals, site);
#endif
}

// Shows barriers to the copies that will count on them.
__device__ __forceinline__ void publish_barriers() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival, and `bytes` more to come before the phase ends.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes,
                                                 Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  emulation::arrive(barrier, bytes, site);
#endif
}

__device__ __forceinline__ void arrive(uint64_t* barrier, Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#else
  emulation::arrive(barrier, 0, site);
#endif
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, int parity,
                                             Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra OVER;\nbra AGAIN;\nOVER:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  emulation::wait_barrier(barrier, parity, site);
#endif
}

// ---- copies of tensor tiles ---------------------------------------------------------------------

// How a tensor of four dimensions lies in memory and which box of it a copy takes (tensor_map.cuh).
// A kernel takes it by value as a __grid_constant__.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulation::TensorMap;
#endif

// Begins to copy the box whose first element is at `at`, innermost dimension first, to `shared`
// (aligned to 1024 bytes) and counts its bytes on the barrier. Elements outside of the tensor are
// zeros. Rows are 128 bytes, whose units of 16 bytes change places: unit u of row r lies in place
// u ^ r % 8.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, uint64_t* barrier,
                                         const int (&at)[4], Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
#else
  emulation::copy_box(shared, map, barrier, at, site);
#endif
}

// Fetches a map before the first copy needs it. A hint.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// Makes this thread's stores to shared memory visible to the products and copies that other threads
// start after a barrier.
__device__ __forceinline__ void publish_stores() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- products of a warpgroup --------------------------------------------------------------------
// They run on while the threads do. Until a wait has seen a product end nobody touches its
// registers or writes what it reads.

// Before the first product, and after registers of one (sums or left operand) have been written.
__device__ __forceinline__ void fence_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulation::fence_products();
#endif
}

// Closes the group of the products begun since the last one.
__device__ __forceinline__ void commit_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulation::commit_products();
#endif
}

// Waits until at most kPending of the latest groups are under way; all threads of the warpgroup
// come. `sums`, which one of those that ended has written, is an operand so that the compiler reads
// none of it before. Waits of different kPlace are not merged into one.
template <int kPending, int kPlace = 0, int kColumns>
__device__ __forceinline__ void wait_products(float (&sums)[kColumns][4],
                                              Site site = Site::here()) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;  // %1" ::"n"(kPending), "n"(kPlace) : "memory");
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
#else
  (void)sums;
  emulation::wait_products(kPending, site);
#endif
}

// Names a matrix in shared memory that copy_box wrote in panels of 64 elements (128 bytes) a row;
// eight rows are `eight_rows` bytes after the last eight. A matrix whose rows lie across the sum
// has several panels, `panel` bytes apart.
__device__ __forceinline__ uint64_t matrix_at(const void* shared, int panel, int eight_rows) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
#ifdef __CUDACC__
  const uint32_t address = shared_address(shared);
#else
  const uint32_t address = emulation::shared_offset(shared);
#endif
  return kSwizzle128 | static_cast<uint64_t>(eight_rows >> 4) << 32 |
         static_cast<uint64_t>(panel >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// The matrix that begins `bytes` behind another one: the address is in the lowest bits, and does
// not leave them.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, int bytes) {
  const uint32_t low = static_cast<uint32_t>(matrix) + static_cast<uint32_t>(bytes >> 4);
  return matrix >> 32 << 32 | low;
}

#ifdef __CUDACC__
#define LONGROPE_SUMS_32                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGROPE_SUMS_64                                                               \
  LONGROPE_SUMS_32                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LONGROPE_SUMS_128                                                                 \
  LONGROPE_SUMS_64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "    \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
  "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "  \
  "%125, %126, %127"
#define LONGROPE_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LONGROPE_16(j) \
  LONGROPE_FOUR(j), LONGROPE_FOUR(j + 1), LONGROPE_FOUR(j + 2), LONGROPE_FOUR(j + 3)
#define LONGROPE_32(j) LONGROPE_16(j), LONGROPE_16(j + 4)
#define LONGROPE_64(j) LONGROPE_32(j), LONGROPE_32(j + 8)
#define LONGROPE_128(j) LONGROPE_64(j), LONGROPE_64(j + 16)

// kColumns columns, kSums = kColumns / 2 registers of sums; the numbers are those of the operands
// behind the sums.
#define LONGROPE_SHARED_PRODUCT(columns, sums, type, A, B, ADD)                      \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD                          \
               ", 0;\n"                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
               " {" LONGROPE_SUMS_##sums "}, %" A ", %" B ", add, 1, 1, 0, 0;\n}\n"  \
               : LONGROPE_##sums(0)                                                  \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define LONGROPE_REGISTER_PRODUCT(columns, sums, type, A, B)                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
               " {" LONGROPE_SUMS_##sums "}, {" A "}, %" B ", 1, 1, 1, 1;\n"         \
               : LONGROPE_##sums(0)                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#endif

// Begins d (+)= A B^T for the 64 rows of A and 8 kColumns rows of B that `a` and `b` name, 16
// columns of each, of T = bf16 or f16. d lies in the lanes of warp w as the sums of mma_16x8x16 for
// the rows from 16 w on.
template <typename T, int kColumns>
__device__ __forceinline__ void begin_product(float (&d)[kColumns][4], uint64_t a, uint64_t b,
                                              bool add, Site site = Site::here()) {
  static_assert(kColumns == 8 || kColumns == 16, "64 or 128 columns");
#ifdef __CUDACC__
  if constexpr (kColumns == 8 && std::is_same_v<T, bf16>) {
    LONGROPE_SHARED_PRODUCT(64, 32, "bf16", "32", "33", "34");
  } else if constexpr (kColumns == 8) {
    LONGROPE_SHARED_PRODUCT(64, 32, "f16", "32", "33", "34");
  } else if constexpr (std::is_same_v<T, bf16>) {
    LONGROPE_SHARED_PRODUCT(128, 64, "bf16", "64", "65", "66");
  } else {
    LONGROPE_SHARED_PRODUCT(128, 64, "f16", "64", "65", "66");
  }
#else
  emulation::begin_product({&d[0][0], 8 * kColumns, std::is_same_v<T, bf16>, nullptr, a, b, add},
                           site);
#endif
}

// Begins d += A B for the 64 rows of A, whose 16 columns lie in registers as the left operand of
// mma_16x8x16, and the 16 rows of B (8 kColumns columns) that `b` names.
template <typename T, int kColumns>
__device__ __forceinline__ void begin_product(float (&d)[kColumns][4], const uint32_t (&a)[4],
                                              uint64_t b, Site site = Site::here()) {
  static_assert(kColumns == 8 || kColumns == 16 || kColumns == 32, "64, 128 or 256 columns");
#ifdef __CUDACC__
  if constexpr (kColumns == 8 && std::is_same_v<T, bf16>) {
    LONGROPE_REGISTER_PRODUCT(64, 32, "bf16", "%32, %33, %34, %35", "36");
  } else if constexpr (kColumns == 8) {
    LONGROPE_REGISTER_PRODUCT(64, 32, "f16", "%32, %33, %34, %35", "36");
  } else if constexpr (kColumns == 16 && std::is_same_v<T, bf16>) {
    LONGROPE_REGISTER_PRODUCT(128, 64, "bf16", "%64, %65, %66, %67", "68");
  } else if constexpr (kColumns == 16) {
    LONGROPE_REGISTER_PRODUCT(128, 64, "f16", "%64, %65, %66, %67", "68");
  } else if constexpr (std::is_same_v<T, bf16>) {
    LONGROPE_REGISTER_PRODUCT(256, 128, "bf16", "%128, %129, %130, %131", "132");
  } else {
    LONGROPE_REGISTER_PRODUCT(256, 128, "f16", "%128, %129, %130, %131", "132");
  }
#else
  emulation::begin_product({&d[0][0], 8 * kColumns, std::is_same_v<T, bf16>, a, 0, b, true}, site);
#endif
}

#ifdef __CUDACC__
#undef LONGROPE_SUMS_32
#undef LONGROPE_SUMS_64
#undef LONGROPE_SUMS_128
#undef LONGROPE_FOUR
#undef LONGROPE_16
#undef LONGROPE_32
#undef LONGROPE_64
#undef LONGROPE_128
#undef LONGROPE_SHARED_PRODUCT
#undef LONGROPE_REGISTER_PRODUCT
#endif

// ---- registers ----------------------------------------------------------------------------------

// What a thread has at entry of a kernel with __launch_bounds__(threads, 1) that asks for all it
// can get: a share of 64 Ki, in eights. The block has so many times its threads to hand around.
constexpr int registers_at_entry(int threads) { return (64 << 10) / threads / 8 * 8; }

// By all threads of a warpgroup: gives up registers beyond kCount, or waits for as many.
template <int kCount>
__device__ __forceinline__ void shrink_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void grow_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace longrope::cuda
