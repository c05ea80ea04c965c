// The union of the parts of the keys (splits.cuh).
//
// Formula: lse = log of the sum of exp(lse_s), out = sum of exp(lse_s - lse) out_s, in float32 and
// in a fixed order; parts without a key are not read.
// Mapping: a block takes a row. Its first warp makes the weights of the parts, a lane every 32nd;
// then a thread takes a column and adds the parts in their order, eight loads under way at once:
// after decoding there are few rows, and what a step costs is the latency of these loads. Bytes
// moved: 4 count (D + 1) in and an element of the output out for every column of a row.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kFlight = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_splits_kernel(AttentionParams p, Splits splits) {
  LONGROPE_SHARED(float, weights, kMaxSplits);
  LONGROPE_SHARED(float, total, 1);
  const int64_t rows = p.batch * p.heads * p.queries, at = blockIdx.x;
  const int64_t batch = at / p.queries / p.heads, query = at % p.queries;
  const Keys queries = attending(p, batch);
  if (query < queries.begin || query >= queries.end) return;
  if (threadIdx.x < 32) {
    float largest = -INFINITY;
    for (int s = threadIdx.x; s < splits.count; s += 32) {
      const float lse = splits.lse[s * rows + at];
      weights[s] = lse;
      largest = lse > largest ? lse : largest;
    }
    largest = warp_max(largest);
    const float shift = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f;
    for (int s = threadIdx.x; s < splits.count; s += 32) {
      const float weight = expf(weights[s] - shift);
      weights[s] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
      total[0] = sum;
      static_cast<float*>(p.lse)[at] = largest == INFINITY ? largest : shift + logf(sum);
    }
  }
  sync_threads();
  const float inverse = total[0] == 0.0f ? 0.0f : 1.0f / total[0];
  T* const out = row_of<T>(p.out, batch, at / p.queries % p.heads, query);
  for (int column = threadIdx.x; column < p.head_dim; column += kThreads) {
    const float* const part = splits.out + at * p.head_dim + column;
    float sum = 0.0f;
    for (int begin = 0; begin < splits.count; begin += kFlight) {
      float x[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        const int s = begin + i;
        x[i] = s < splits.count && weights[s] != 0.0f ? part[s * rows * p.head_dim] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        if (begin + i < splits.count) sum = fmaf(weights[begin + i], x[i], sum);
      }
    }
    out[column] = from_float<T>(sum * inverse);
  }
}

LONGROPE_MAX_REGISTERS(merge_splits_kernel, 48)

}  // namespace

void merge_splits(const AttentionParams& p, const Splits& splits, cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.queries;
  for_dtype(p.dtype, [&](auto zero) {
    launch("attention", merge_splits_kernel<decltype(zero)>, rows, kThreads, 0, stream, p, splits);
  });
}

}  // namespace cuda
}  // namespace longrope
