// Copies of tensors whose rows do not begin at multiples of 16 bytes.
//
// Mapping: a warp takes a row, its lanes neighbouring columns. Bytes moved: every element in and
// out.
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) copy_kernel(Copy c) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= c.batch * c.heads * c.tokens) return;
  const int64_t token = at % c.tokens, head = at / c.tokens % c.heads,
                row = at / c.tokens / c.heads;
  const T* x = row_of<const T>(c.x, row, head, token);
  T* out = row_of<T>(c.out, row, head, token);
  const int head_dim = static_cast<int>(c.head_dim);
  for (int i = threadIdx.x % 32; i < head_dim; i += 32) out[i] = x[i];
}

LONGROPE_MAX_REGISTERS(copy_kernel, 64)

}  // namespace

void copy(const Copy& c, DType dtype, cudaStream_t stream) {
  const int64_t rows = c.batch * c.heads * c.tokens;
  if (rows == 0) return;
  for_dtype(dtype, [&](auto zero) {
    launch("attention", copy_kernel<decltype(zero)>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kWarps))), dim3(32 * kWarps), 0,
           stream, c);
  });
}

}  // namespace cuda
}  // namespace longrope
