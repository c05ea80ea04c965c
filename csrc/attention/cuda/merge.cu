// merge_attention: the union of two disjoint key sets.
//
// Formula: AttentionMergeParams in csrc/attention/attention.h, in float32, one rounding at the end.
// Mapping: a block takes a run of queries of one head, a thread 16 bytes of one query's row (a
// single element where rows are not aligned). The two weights are computed by every thread of a
// row. Bytes moved: 3 B H N D elements and 12 B H N bytes of log-sum-exps. A side without part is
// not read.
#include <algorithm>

#include "attention/attention.h"
#include "attention/cuda/views.cuh"
#include "common/cuda/device.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(AttentionMergeParams p, unsigned tiles, int rows, int units) {
  const unsigned heads = static_cast<unsigned>(p.heads);
  const unsigned row = blockIdx.x / tiles / heads, head = blockIdx.x / tiles % heads;
  const int64_t query = static_cast<int64_t>(blockIdx.x % tiles) * rows + threadIdx.x / units;
  if (threadIdx.x >= rows * units || query >= p.queries) return;
  const int64_t at = (static_cast<int64_t>(row) * heads + head) * p.queries + query;
  const float lse_a = static_cast<const float*>(p.lse_a)[at];
  const float lse_b = static_cast<const float*>(p.lse_b)[at];
  const float lowest = -INFINITY;
  const float more = lse_a > lse_b ? lse_a : lse_b, less = lse_a > lse_b ? lse_b : lse_a;
  // exp(less - more), with the limits at the infinities: equal ones share, else one takes all.
  const float ratio = less == lowest ? 0.0f : more == less ? 1.0f : expf(less - more);
  const float sum = 1.0f + ratio;
  const float weight_a = lse_a == lowest ? 0.0f : (lse_a > lse_b ? 1.0f : ratio) / sum;
  const float weight_b = lse_b == lowest ? 0.0f : (lse_a > lse_b ? ratio : 1.0f) / sum;

  for (int unit = threadIdx.x % units; unit * kCount < p.head_dim; unit += units) {
    float total[kCount] = {}, part[kCount];
    if (weight_a != 0.0f) {
      unpack(load<kCount>(row_of<const T>(p.out_a, row, head, query) + unit * kCount), part);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] = weight_a * part[i];
    }
    if (weight_b != 0.0f) {
      unpack(load<kCount>(row_of<const T>(p.out_b, row, head, query) + unit * kCount), part);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += weight_b * part[i];
    }
    store(row_of<T>(p.out, row, head, query) + unit * kCount, pack<T>(total));
  }
  if (threadIdx.x % units == 0) {
    static_cast<float*>(p.lse)[at] = ratio == 0.0f ? more : more + logf(sum);
  }
}

LONGROPE_MAX_REGISTERS(merge_kernel, 48)

template <typename T, int kCount>
void run(const AttentionMergeParams& p, cudaStream_t stream) {
  const int units =
      static_cast<int>(std::clamp<int64_t>(ceil_div<int64_t>(p.head_dim, kCount), 1, kThreads));
  const int rows = static_cast<int>(std::min<int64_t>(kThreads / units, p.queries));
  const int64_t tiles = ceil_div<int64_t>(p.queries, rows);
  launch("merge_attention", merge_kernel<T, kCount>, p.batch * p.heads * tiles,
         ceil_div(rows * units, 32) * 32, 0, stream, p, static_cast<unsigned>(tiles), rows, units);
}

}  // namespace
}  // namespace cuda

void attention_merge_cuda(const AttentionMergeParams& p, void* stream) {
  if (p.batch * p.heads * p.queries == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  cuda::for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kCount = 16 / sizeof(T);
    bool packed = p.head_dim % kCount == 0;
    for (const AttentionTensor* x : {&p.out_a, &p.out_b, &p.out}) {
      packed = packed && cuda::packs<T>(*x);
    }
    packed ? cuda::run<T, kCount>(p, on) : cuda::run<T, 1>(p, on);
  });
}

}  // namespace longrope
