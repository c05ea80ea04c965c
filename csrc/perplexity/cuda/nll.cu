// Online log-sum-exp and target logit of a chunk of logits.
//
// Formula: csrc/perplexity/perplexity.h, in float32. The state of a row (largest logit, sum of
// exponentials relative to it, target's logit) passes from chunk to chunk in device memory.
// Mapping: a warp takes a row; a lane reads 16 bytes at a time, four of them in flight, and keeps
// its own largest logit and sum, which are joined at the end in one fixed order. Bytes moved: 4
// rows columns, most of it from the second-level cache if the chunk is small beside that.
#include "perplexity/cuda/chunk.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kFlight = 4;

// Sums of exponentials relative to a largest logit; the base of nothing but -inf is 0, so that
// -inf - -inf is never formed.
struct LogSum {
  float largest, sum;

  __device__ __forceinline__ float base() const { return largest == -INFINITY ? 0.0f : largest; }

  __device__ __forceinline__ void join(const LogSum& other) {
    const LogSum mine = *this;
    largest = other.largest > largest ? other.largest : largest;
    sum = mine.sum * expf(mine.largest - base()) + other.sum * expf(other.largest - base());
  }
};

__global__ void __launch_bounds__(32 * kRowsPerBlock)
    nll_chunk_kernel(NllChunkParams p, bool packed) {
  const LogitsChunk& chunk = p.chunk;
  const int64_t row = row_of_warp();
  if (row >= chunk.rows) return;
  const bool is_first = chunk.first == 0, is_last = chunk.first + chunk.columns == chunk.vocab;
  const int64_t target = chunk.targets[row];
  const int lane = threadIdx.x % 32;
  if (target == chunk.ignore_index) {
    if (lane == 0 && is_last) p.nll[row] = p.largest[row] = p.log_sum[row] = 0.0f;
    return;
  }

  const auto cap = static_cast<float>(chunk.softcap);
  LogSum mine{-INFINITY, 0.0f};
  for_columns<kFlight>(chunk, row, packed, [&](int column, float (&x)[4], int count) {
    (void)column;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = Capped(x[i], cap).logit;
    const float before = mine.largest;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count && x[i] > mine.largest) mine.largest = x[i];
    }
    const float base = mine.base();
    if (mine.largest != before) mine.sum *= expf(before - base);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) mine.sum += expf(x[i] - base);
    }
  });
  for (int distance = 16; distance > 0; distance /= 2) {
    const LogSum other{shfl_xor(kAllLanes, mine.largest, distance),
                       shfl_xor(kAllLanes, mine.sum, distance)};
    // Both lanes must join in the same order to agree in every bit.
    LogSum low = (lane & distance) ? other : mine;
    low.join((lane & distance) ? mine : other);
    mine = low;
  }
  if (lane != 0) return;

  LogSum total{-INFINITY, 0.0f};
  if (!is_first) total = {p.largest[row], p.log_sum[row]};
  total.join(mine);
  float target_logit = is_first ? 0.0f : p.target_logit[row];
  if (target >= chunk.first && target < chunk.first + chunk.columns) {
    target_logit = Capped(chunk.logits[row * chunk.row_stride + (target - chunk.first)], cap).logit;
  }
  if (is_last) {
    const bool known = target >= 0 && target < chunk.vocab;
    total.sum = known ? logf(total.sum) : NAN;
    p.nll[row] = (total.largest - target_logit) + total.sum;
  }
  p.target_logit[row] = target_logit;
  p.largest[row] = total.largest;
  p.log_sum[row] = total.sum;
}

LONGROPE_MAX_REGISTERS(nll_chunk_kernel, 64)

}  // namespace
}  // namespace cuda

void linear_nll_chunk_cuda(const NllChunkParams& params, void* stream) {
  const LogitsChunk& chunk = params.chunk;
  if (chunk.rows == 0) return;
  cuda::launch_rows("linear_nll", cuda::nll_chunk_kernel, chunk.rows, stream, params,
                    cuda::rows_are_packed(chunk.logits, chunk.row_stride));
}

}  // namespace longrope
