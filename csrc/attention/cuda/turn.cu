// Rotation of queries or keys before attention, and copies of tensors whose rows do not begin at
// multiples of 16 bytes.
//
// Formula: AttentionRotation in csrc/attention/attention.h, in float32 with one rounding at the
// store; elements beyond the pairs are copied. The phases are exact: the tables come from ops.rope.
// Why apart from the attention kernel: there every block of rows would turn every key again, and
// keys are read by many blocks. The price is one pass over q and k: 2 (H N + Hk M) D elements and,
// from the cache but for once, 8 bytes of tables for each pair; a decode step (N = 1) over a cache
// of un-rotated keys so moves 2 times what one over rotated keys does (k in, k out, k and v in,
// instead of k and v in).
// Mapping: a warp takes a row, its lanes neighbouring pairs.
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) turn_kernel(Turn t) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= t.batch * t.heads * t.tokens) return;
  const int64_t token = at % t.tokens, head = at / t.tokens % t.heads,
                row = at / t.tokens / t.heads;
  const T* x = row_of<const T>(t.x, row, head, token);
  T* out = row_of<T>(t.out, row, head, token);
  const AttentionRotation& rotation = t.rotation;
  const int lane = threadIdx.x % 32, head_dim = static_cast<int>(t.head_dim);
  const int pairs = rotation.cos ? static_cast<int>(rotation.pairs) : 0;
  const int64_t table = row * rotation.batch_stride + token * rotation.token_stride;
  for (int i = lane; i < pairs; i += 32) {
    const int first = rotation.interleaved ? 2 * i : i;
    const int second = rotation.interleaved ? 2 * i + 1 : i + pairs;
    const float cos = rotation.cos[table + i], sin = rotation.sin[table + i];
    const float x1 = to_float(x[first]), x2 = to_float(x[second]);
    out[first] = from_float<T>(x1 * cos - x2 * sin);
    out[second] = from_float<T>(x2 * cos + x1 * sin);
  }
  for (int i = 2 * pairs + lane; i < head_dim; i += 32) out[i] = x[i];
}

LONGROPE_MAX_REGISTERS(turn_kernel, 64)

}  // namespace

void turn(const Turn& t, DType dtype, cudaStream_t stream) {
  const int64_t rows = t.batch * t.heads * t.tokens;
  if (rows == 0) return;
  for_dtype(dtype, [&](auto zero) {
    launch("attention", turn_kernel<decltype(zero)>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kWarps))), dim3(32 * kWarps), 0,
           stream, t);
  });
}

}  // namespace cuda
}  // namespace longrope
