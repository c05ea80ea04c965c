// The union of the parts of the keys (splits.cuh).
//
// Formula: lse = log of the sum of exp(lse_s), out = sum of exp(lse_s - lse) out_s, in float32 and
// in the order of the parts; parts without a key are not read.
// Mapping: a warp takes a row, its lanes neighbouring columns. Bytes moved: 4 count (D + 1) in and
// an element of the output out for every column of a row.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 8;  // of a lane

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    merge_splits_kernel(AttentionParams p, Splits splits) {
  const int64_t rows = p.batch * p.heads * p.queries;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= rows) return;
  const Keys queries = attending(p, at / p.queries / p.heads);
  if (at % p.queries < queries.begin || at % p.queries >= queries.end) return;
  const int lane = threadIdx.x % 32;
  float largest = -INFINITY;
  for (int s = 0; s < splits.count; ++s) {
    const float lse = splits.lse[s * rows + at];
    largest = lse > largest ? lse : largest;
  }
  const float shift = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f, o[kColumns] = {};
  for (int s = 0; s < splits.count; ++s) {
    const float lse = splits.lse[s * rows + at];
    const float weight = expf(lse - shift);
    if (weight == 0.0f) continue;
    sum += weight;
    const float* part = splits.out + (s * rows + at) * p.head_dim;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (32 * c + lane < p.head_dim) o[c] += weight * part[32 * c + lane];
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* out = row_of<T>(p.out, at / p.queries / p.heads, at / p.queries % p.heads, at % p.queries);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (32 * c + lane < p.head_dim) out[32 * c + lane] = from_float<T>(o[c] * inverse);
  }
  if (lane == 0) {
    static_cast<float*>(p.lse)[at] = largest == INFINITY ? largest : shift + logf(sum);
  }
}

LONGROPE_MAX_REGISTERS(merge_splits_kernel, 64)

}  // namespace

void merge_splits(const AttentionParams& p, const Splits& splits, cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.queries;
  for_dtype(p.dtype, [&](auto zero) {
    launch("attention", merge_splits_kernel<decltype(zero)>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kWarps))), dim3(32 * kWarps), 0,
           stream, p, splits);
  });
}

}  // namespace cuda
}  // namespace longrope
