// Kernels that try the host runtime: right ones, and wrong ones that it must catch. Every kernel
// takes (in, out); test_runtime.py knows what each must give.
#include <cstdio>

#include "common/cuda/device.cuh"

namespace longrope::cuda::selftest {

// Threads from 40 on leave before the barrier; the others reverse 40 numbers.
__global__ void early_return(const float* in, float* out) {
  LONGROPE_SHARED(float, values, 40);
  const int t = threadIdx.x;
  if (t >= 40) return;
  values[t] = in[t];
  sync_threads();
  out[t] = values[39 - t];
}

// The same without the barrier.
__global__ void missing_barrier(const float* in, float* out) {
  LONGROPE_SHARED(float, values, 64);
  const int t = threadIdx.x;
  values[t] = in[t];
  out[t] = values[63 - t];
}

__global__ void shuffles(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = shfl(kAllLanes, in[t], 3, 8);
  out[32 + t] = shfl_xor(kAllLanes, in[t], 2, 4);
  out[64 + t] = shfl_up(kAllLanes, in[t], 1, 16);
  out[96 + t] = shfl_down(kAllLanes, in[t], 3, 8);
  out[128 + t] = static_cast<float>(shfl_xor(kAllLanes, static_cast<double>(in[t]), 16));
  out[160 + t] = warp_sum(in[t]);
  out[192 + t] = warp_max(in[t], 4);
}

// Two halves of a warp exchange apart from each other, and a third of the lanes has left.
__global__ void partial_masks(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = t < 16 ? shfl_xor(0x0000FFFFu, in[t], 1) : shfl_xor(0xFFFF0000u, in[t], 2);
  if (t >= 24) return;
  out[32 + t] = shfl_down(kAllLanes, in[t], 8);
  out[64 + t] = static_cast<float>(ballot(kAllLanes, t % 2 == 0));
  out[96 + t] = any(kAllLanes, t == 30) ? 1.0f : 0.0f;
  out[128 + t] = all(kAllLanes, t < 24) ? 1.0f : 0.0f;
}

__global__ void lost_lane(const float* in, float* out) {
  const int t = threadIdx.x;
  if (t == 5) sync_threads();
  out[t] = shfl_xor(kAllLanes, in[t], 1);
}

__global__ void divergent_warp(const float* in, float* out) {
  const int t = threadIdx.x;
  if (t < 16) {
    out[t] = shfl_xor(kAllLanes, in[t], 1);
  } else {
    out[t] = ballot(kAllLanes, in[t] > 0) ? 1.0f : 0.0f;
  }
}

__global__ void divergent_barrier(const float* in, float* out) {
  if (threadIdx.x < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

// Warp 0 hands numbers to warp 1 through barriers 1 (full) and 2 (empty), one buffer, four times.
__global__ void named_barriers(const float* in, float* out) {
  LONGROPE_SHARED(float, buffer, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int step = 0; step < 4; ++step) {
    if (warp == 0) {
      bar_sync(2, 64);
      buffer[lane] = in[32 * step + lane];
      bar_arrive(1, 64);
    } else {
      bar_arrive(2, 64);
      bar_sync(1, 64);
      out[32 * step + lane] = buffer[lane];
    }
  }
}

// Barrier 3 waits for a warp that does not come.
__global__ void deadlock(const float* in, float* out) {
  if (threadIdx.x < 32) bar_sync(3, 64);
  out[threadIdx.x] = in[threadIdx.x];
}

// Warp 1 does not come for what warp 0 announces.
__global__ void left_arrival(const float* in, float* out) {
  if (threadIdx.x < 32) bar_arrive(1, 64);
  out[threadIdx.x] = in[threadIdx.x];
}

// Two groups of 32 x 16 bytes, used after waits that leave kPending groups under way.
template <int kFirst, int kSecond>
__device__ void copy_groups(const float* in, float* out) {
  LONGROPE_SHARED(float, buffer, 256);
  const int t = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    const int at = 128 * group + 4 * t;
    cp_async_16(buffer + at, in + at, t != 31);  // the last vector is zeros
    cp_async_commit();
  }
  cp_async_wait<kFirst>();
  sync_threads();
  for (int i = t; i < 128; i += 32) out[i] = buffer[127 - i];
  cp_async_wait<kSecond>();
  sync_threads();
  for (int i = t; i < 128; i += 32) out[128 + i] = buffer[255 - i];
}

__global__ void async_copies(const float* in, float* out) { copy_groups<1, 0>(in, out); }
__global__ void async_missing_wait(const float* in, float* out) { copy_groups<1, 1>(in, out); }

// A block that reads what it did not write: must see poison, also after an earlier block.
__global__ void stale_shared(const float* in, float* out) {
  LONGROPE_SHARED(float, fixed, 32);
  float* dynamic = reinterpret_cast<float*>(dynamic_shared());
  const int t = threadIdx.x;
  out[64 * blockIdx.x + t] = fixed[t];
  out[64 * blockIdx.x + 32 + t] = dynamic[t];
  sync_threads();
  fixed[t] = dynamic[t] = in[t];
}

// out[block 32 x 32] = in as 16-bit rows of 64 bytes, moved by ldmatrix, four 8x8 at a time.
template <bool kTranspose>
__device__ void move_matrices(const float* in, float* out) {
  LONGROPE_SHARED(uint16_t, tile, 16 * 16);
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) tile[i] = from_float<bf16>(in[i]).bits;
  sync_threads();
  uint32_t four[4], two[2], one[1];
  // Matrix m covers rows 8 (m % 2) and columns 8 (m / 2).
  const uint16_t* row = tile + 16 * (t % 16) + 8 * (t / 16);
  ldmatrix<kTranspose>(four, row);
  ldmatrix<kTranspose>(two, row);
  ldmatrix<kTranspose>(one, row);
  for (int e = 0; e < 2; ++e) {
    for (int m = 0; m < 7; ++m) {
      const uint32_t pair = m < 4 ? four[m] : m < 6 ? two[m - 4] : one[0];
      const bf16 element{static_cast<uint16_t>(pair >> 16 * e)};
      out[64 * m + 8 * (t / 4) + 2 * (t % 4) + e] = to_float(element);
    }
  }
}

__global__ void load_matrices(const float* in, float* out) { move_matrices<false>(in, out); }
__global__ void load_transposed(const float* in, float* out) { move_matrices<true>(in, out); }

// out [16, 8] = in [16, 16] times in[256 ..] [16, 8] plus in[384 ..] [16, 8], registers filled by
// hand from the layout in ptx.cuh.
template <typename T>
__device__ void multiply(const float* in, float* out) {
  const int group = threadIdx.x / 4, pair = 2 * (threadIdx.x % 4);
  const float *a = in, *b = in + 256, *c = in + 384;
  uint32_t fa[4], fb[2];
  float fc[4], fd[4];
  for (int r = 0; r < 4; ++r) {
    const float* at = a + 16 * (group + 8 * (r & 1)) + pair + 8 * (r >> 1);
    fa[r] = pack_pair<T>(at[0], at[1]);
    fc[r] = c[8 * (group + 8 * (r >> 1)) + pair + (r & 1)];
  }
  for (int r = 0; r < 2; ++r) {
    const float* at = b + 8 * (pair + 8 * r) + group;
    fb[r] = pack_pair<T>(at[0], at[8]);
  }
  mma_16x8x16<T>(fd, fa, fb, fc);
  for (int r = 0; r < 4; ++r) out[8 * (group + 8 * (r >> 1)) + pair + (r & 1)] = fd[r];
}

__global__ void multiply_bf16(const float* in, float* out) { multiply<bf16>(in, out); }
__global__ void multiply_f16(const float* in, float* out) { multiply<f16>(in, out); }

// The same product with the fragments of a and b loaded by ldmatrix, b transposed on the way.
__global__ void multiply_loaded(const float* in, float* out) {
  LONGROPE_SHARED(uint16_t, a, 256);
  LONGROPE_SHARED(uint16_t, b, 128);
  const int t = threadIdx.x, group = t / 4, pair = 2 * (t % 4);
  for (int i = t; i < 256; i += 32) a[i] = from_float<bf16>(in[i]).bits;
  for (int i = t; i < 128; i += 32) b[i] = from_float<bf16>(in[256 + i]).bits;
  sync_threads();
  uint32_t fa[4], fb[2];
  float sum[4];
  for (int r = 0; r < 4; ++r) sum[r] = in[384 + 8 * (group + 8 * (r >> 1)) + pair + (r & 1)];
  ldmatrix<false>(fa, a + 16 * (t % 16) + 8 * (t / 16));
  ldmatrix<true>(fb, b + 8 * (t % 16));
  mma_16x8x16<bf16>(sum, fa, fb, sum);
  for (int r = 0; r < 4; ++r) out[8 * (group + 8 * (r >> 1)) + pair + (r & 1)] = sum[r];
}

__global__ void atomics(const float* in, float* out) {
  atomicAdd(out, 1.0f);
  atomicMax(reinterpret_cast<int*>(out) + 1, static_cast<int>(in[threadIdx.x]));
}

// Float sums in the order of arrival: not deterministic, and seen as such.
__global__ void ordered_sum(const float* in, float* out) { atomicAdd(out, in[threadIdx.x]); }

__global__ void misaligned(const float* in, float* out) { store(out, load<4>(in + 1)); }

__global__ void beyond_the_end(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1024];  // a test buffer ends there
}

__global__ void beyond_shared(const float* in, float* out) {
  float* dynamic = reinterpret_cast<float*>(dynamic_shared());
  cp_async_16(dynamic + 32, in);
  out[0] = 0;
}

// 16-bit elements to float and back.
__global__ void widen(bool is_bf16, const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = is_bf16 ? to_float(bf16{in[i]}) : to_float(f16{in[i]});
  }
}

__global__ void narrow(bool is_bf16, const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = is_bf16 ? from_float<bf16>(in[i]).bits : from_float<f16>(in[i]).bits;
  }
}

using Kernel = void (*)(const float*, float*);

struct Entry {
  const char* name;
  Kernel kernel;
  int64_t grid;
  int block;
  size_t shared;
};

constexpr Entry kEntries[] = {
    {"early_return", early_return, 1, 64, 0},
    {"missing_barrier", missing_barrier, 1, 64, 0},
    {"shuffles", shuffles, 1, 32, 0},
    {"partial_masks", partial_masks, 1, 32, 0},
    {"lost_lane", lost_lane, 1, 32, 0},
    {"divergent_warp", divergent_warp, 1, 32, 0},
    {"divergent_barrier", divergent_barrier, 1, 64, 0},
    {"named_barriers", named_barriers, 1, 64, 0},
    {"deadlock", deadlock, 1, 64, 0},
    {"left_arrival", left_arrival, 1, 64, 0},
    {"async_copies", async_copies, 1, 32, 0},
    {"async_missing_wait", async_missing_wait, 1, 32, 0},
    {"stale_shared", stale_shared, 3, 32, 128},
    {"load_matrices", load_matrices, 1, 32, 0},
    {"load_transposed", load_transposed, 1, 32, 0},
    {"multiply_bf16", multiply_bf16, 1, 32, 0},
    {"multiply_f16", multiply_f16, 1, 32, 0},
    {"multiply_loaded", multiply_loaded, 1, 32, 0},
    {"atomics", atomics, 2, 100, 0},
    {"ordered_sum", ordered_sum, 1, 256, 0},
    {"misaligned", misaligned, 1, 32, 0},
    {"beyond_the_end", beyond_the_end, 1, 32, 0},
    {"beyond_shared", beyond_shared, 1, 32, 128},
    {"too_many_threads", early_return, 1, 1056, 0},
    {"too_much_shared", early_return, 1, 32, size_t{200} << 10},
    {"too_many_blocks", early_return, int64_t{1} << 31, 32, 0},
};

void run(const std::string& name, const float* in, float* out) {
  for (const Entry& e : kEntries) {
    if (name == e.name) {
      launch(e.name, e.kernel, e.grid, e.block, e.shared, nullptr, in, out);
      return;
    }
  }
  throw std::runtime_error("no kernel named " + name);
}

}  // namespace longrope::cuda::selftest

namespace {
std::string last_error;
}

extern "C" {

// Runs a kernel; null, or the report.
const char* selftest_run(const char* name, const float* in, float* out) {
  try {
    longrope::cuda::selftest::run(name, in, out);
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

void selftest_to_float(int is_bf16, const uint16_t* in, float* out, int64_t count) {
  using namespace longrope::cuda;
  launch("widen", selftest::widen, 1, 32, 0, nullptr, is_bf16 != 0, in, out, count);
}

void selftest_from_float(int is_bf16, const float* in, uint16_t* out, int64_t count) {
  using namespace longrope::cuda;
  launch("narrow", selftest::narrow, 1, 32, 0, nullptr, is_bf16 != 0, in, out, count);
}

}  // extern "C"

#ifdef SELFTEST_MAIN  // for AddressSanitizer, which wants to own the process
int main(int, char** argv) {
  auto* in = new float[1024]();
  auto* out = new float[1024]();
  const char* report = selftest_run(argv[1], in, out);
  if (report) std::fprintf(stderr, "%s\n", report);
  delete[] in;
  delete[] out;
  return report != nullptr;
}
#endif
