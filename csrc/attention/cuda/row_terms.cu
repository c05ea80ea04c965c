// What the gradients need of every query: its log-sum-exp in powers of two, and delta.
//
// Formula: delta = dOut . out - dLse (csrc/attention/attention.h) in float32. Queries whose lse is
// -inf, whatever they hold, get terms that make their weights 0.
// Mapping: a warp takes a query of one head, its lanes neighbouring columns. Bytes moved: 2 D
// elements and 16 bytes for every query of a head.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    row_terms_kernel(AttentionBackwardParams g, RowTerms terms) {
  const AttentionParams& p = g.forward;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= p.batch * p.heads * p.queries) return;
  const int64_t query = at % p.queries, head = at / p.queries % p.heads;
  const int64_t row = at / p.queries / p.heads;
  const T* out = row_of<const T>(p.out, row, head, query);
  const T* grad_out = row_of<const T>(g.grad_out, row, head, query);
  float sum = 0.0f;
  for (int c = threadIdx.x % 32; c < p.head_dim; c += 32) {
    sum = fmaf(to_float(out[c]), to_float(grad_out[c]), sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  const float lse = static_cast<const float*>(p.lse)[at];
  const bool is_empty = lse == -INFINITY;
  terms.log2_sum[at] = is_empty ? INFINITY : lse * kLog2E;
  terms.delta[at] =
      is_empty ? 0.0f : sum - (g.grad_lse ? static_cast<const float*>(g.grad_lse)[at] : 0.0f);
}

LONGROPE_MAX_REGISTERS(row_terms_kernel, 48)

}  // namespace

void row_terms(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  for_dtype(p.dtype, [&](auto zero) {
    launch("attention_backward", row_terms_kernel<decltype(zero)>,
           ceil_div<int64_t>(p.batch * p.heads * p.queries, kWarps), 32 * kWarps, 0, stream, g,
           terms);
  });
}

}  // namespace cuda
}  // namespace longrope
