// The results of queries that do not attend: out 0 and lse -inf.
//
// Mapping: a warp takes a query of one head, its lanes neighbouring columns. Bytes moved: D
// elements and 4 bytes out for every such query of a head.
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) idle_kernel(AttentionParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= p.batch * p.heads * p.queries) return;
  const int64_t query = at % p.queries, head = at / p.queries % p.heads;
  const int64_t row = at / p.queries / p.heads;
  const Keys queries = attending(p, row);
  if (query >= queries.begin && query < queries.end) return;
  T* out = row_of<T>(p.out, row, head, query);
  for (int c = threadIdx.x % 32; c < p.head_dim; c += 32) out[c] = from_float<T>(0.0f);
  if (threadIdx.x % 32 == 0) static_cast<float*>(p.lse)[at] = -INFINITY;
}

LONGROPE_MAX_REGISTERS(idle_kernel, 48)

}  // namespace

void write_idle(const AttentionParams& p, cudaStream_t stream) {
  const bool every = !p.query_begin.rows && p.query_begin.all <= 0 && !p.query_end.rows &&
                     p.query_end.all >= p.queries;
  if (every) return;
  for_dtype(p.dtype, [&](auto zero) {
    launch("attention", idle_kernel<decltype(zero)>,
           ceil_div<int64_t>(p.batch * p.heads * p.queries, kWarps), 32 * kWarps, 0, stream, p);
  });
}

}  // namespace cuda
}  // namespace longrope
