// Sums of nll and counts of scored rows by candidate.
//
// Mapping: a block takes a candidate and looks at every row; a thread adds every kThreads-th row in
// float64, and the threads' sums are joined in one fixed order: deterministic.
// Bytes moved: 20 bytes a row and candidate, but for one candidate's worth from the cache.
#include "common/cuda/device.cuh"
#include "perplexity/perplexity.h"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) candidate_sums_kernel(CandidateSumsParams p) {
  LONGROPE_SHARED(double, sums, kThreads / 32);
  LONGROPE_SHARED(long long, counts, kThreads / 32);
  double sum = 0.0;
  long long count = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kThreads) {
    if (p.candidate[row] != blockIdx.x || p.targets[row] == p.ignore_index) continue;
    sum += p.nll[row];
    ++count;
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = sum;
    counts[threadIdx.x / 32] = count;
  }
  sync_threads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    sum += sums[warp];
    count += counts[warp];
  }
  p.sums[blockIdx.x] = sum;
  p.counts[blockIdx.x] = count;
}

LONGROPE_MAX_REGISTERS(candidate_sums_kernel, 40)

}  // namespace
}  // namespace cuda

void candidate_sums_cuda(const CandidateSumsParams& params, void* stream) {
  if (params.candidates == 0) return;
  cuda::launch("candidate_sums", cuda::candidate_sums_kernel, params.candidates, cuda::kThreads, 0,
               static_cast<cudaStream_t>(stream), params);
}

}  // namespace longrope
