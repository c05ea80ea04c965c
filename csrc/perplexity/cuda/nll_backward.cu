// Gradient of a chunk of logits.
//
// Formula: d logits = (exp(logits - lse) - onehot(target)) grad_nll (times the softcap's slope), in
// float32, rounded once to the type of the matrix products that follow. Ignored rows give 0.
// Mapping: a warp takes a row; a lane reads four neighbouring logits and writes four gradients.
// Bytes moved: 4 rows columns in, 2 (4 for float32) rows columns out.
#include "perplexity/cuda/chunk.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kFlight = 2;

template <typename T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    nll_backward_chunk_kernel(NllBackwardChunkParams p, bool packed) {
  const LogitsChunk& chunk = p.chunk;
  const int64_t row = row_of_warp();
  if (row >= chunk.rows) return;
  const int64_t target = chunk.targets[row];
  const bool ignored = target == chunk.ignore_index;
  const bool known = target >= 0 && target < chunk.vocab;
  const auto hit = static_cast<int>(known ? target - chunk.first : -1);
  const auto cap = static_cast<float>(chunk.softcap);
  const float largest = p.largest[row], log_sum = p.log_sum[row];
  const float grad = ignored ? 0.0f : known ? p.grad_nll[row] : NAN;
  T* out = static_cast<T*>(p.grad_logits) + row * p.grad_row_stride;
  for_columns<kFlight>(chunk, row, packed, [&](int column, float (&x)[4], int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Capped capped(x[i], cap);
      const float probability = expf((capped.logit - largest) - log_sum);
      const float error = probability - (column + i == hit ? 1.0f : 0.0f);
      x[i] = ignored ? 0.0f : error * grad * capped.slope;
    }
    store_columns(out + column, x, count, packed);
  });
}

LONGROPE_MAX_REGISTERS(nll_backward_chunk_kernel, 64)

}  // namespace
}  // namespace cuda

void linear_nll_backward_chunk_cuda(const NllBackwardChunkParams& params, void* stream) {
  const LogitsChunk& chunk = params.chunk;
  if (chunk.rows == 0 || chunk.columns == 0) return;
  cuda::for_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool packed = cuda::rows_are_packed(chunk.logits, chunk.row_stride) &&
                        cuda::rows_are_packed(params.grad_logits, params.grad_row_stride);
    cuda::launch_rows("linear_nll_backward", cuda::nll_backward_chunk_kernel<T>, chunk.rows, stream,
                      params, packed);
  });
}

}  // namespace longrope
