// Copies of tensors whose rows do not begin and end at multiples of 16 bytes, to rows that do.
//
// Mapping: a warp takes a row, its lanes neighbouring columns. Bytes moved: every element in and
// out.
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 8;

__global__ void __launch_bounds__(32 * kWarps) copy_kernel(Copy c) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= c.batch * c.heads * c.tokens) return;
  const int64_t token = at % c.tokens, head = at / c.tokens % c.heads,
                row = at / c.tokens / c.heads;
  const uint16_t* x = row_of<const uint16_t>(c.x, row, head, token);
  uint16_t* out = row_of<uint16_t>(c.out, row, head, token);
  for (int i = threadIdx.x % 32; i < c.width; i += 32) {
    out[i] = i < c.columns ? x[i] : static_cast<uint16_t>(0);
  }
}

LONGROPE_MAX_REGISTERS(copy_kernel, 64)

}  // namespace

void copy(const Copy& c, cudaStream_t stream) {
  const int64_t rows = c.batch * c.heads * c.tokens;
  if (rows == 0) return;
  launch("attention", copy_kernel, ceil_div<int64_t>(rows, kWarps), 32 * kWarps, 0, stream, c);
}

}  // namespace cuda
}  // namespace longrope
