// Attention of float32 elements, in float32 throughout: correct and plain, not fast.
//
// Formula: csrc/attention/attention.h with the online softmax of forward.cu.
// Accumulation: float32, in sums of at most 32 terms that are added up.
// Mapping: a block of four warps takes 16 rows of one key/value head and walks through the keys
// that they see, 32 at a time. For the scores a lane takes a key, for the output a column of every
// 32; a warp keeps four rows. Parts of the keys as in forward.cu. Bytes moved: q and out once, k
// and v once for every 16 rows.
#include "attention/cuda/float_tile.cuh"
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kFloatThreads)
    attention_float_kernel(AttentionParams p, Splits splits) {
  const int head_dim = static_cast<int>(p.head_dim), stride = float_stride(head_dim);
  const Assignment work(p, kFloatRows, kFloatKeys, splits.count);
  if (work.is_idle) return;
  const Head& head = work.head;
  auto* const q = reinterpret_cast<float*>(dynamic_shared());  // [kFloatRows, stride]
  float* const k = q + kFloatRows * stride;                    // [kFloatKeys, stride]
  float* const v = k + kFloatKeys * stride;                    // the same
  float* const weights = v + kFloatKeys * stride;              // [kFloatRows, kFloatKeys]
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kRowsOfWarp;
  const int first = work.first_row + warp_row;
  const FloatScore score(p);

  read_rows(q, kFloatRows, head_dim, [&](int r) {
    r += work.first_row;
    return r < head.rows ? head.row<const float>(p.q, r) : nullptr;
  });
  float o[kRowsOfWarp][kFloatColumns] = {}, largest[kRowsOfWarp], sum[kRowsOfWarp] = {};
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) largest[r] = -INFINITY;

  for (int begin = work.keys.begin; begin < work.keys.end; begin += kFloatKeys) {
    const auto key_at = [&](const AttentionTensor& x, int key) {
      return begin + key < work.keys.end ? head.key<const float>(x, begin + key) : nullptr;
    };
    sync_threads();  // no warp needs the last tile
    read_rows(k, kFloatKeys, head_dim, [&](int key) { return key_at(p.k, key); });
    read_rows(v, kFloatKeys, head_dim, [&](int key) { return key_at(p.v, key); });
    sync_threads();
    float s[kRowsOfWarp];
    products(s, q + warp_row * stride, k + lane * stride, head_dim);
    float before[kRowsOfWarp];
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const Keys seen = head.visible.keys(head.query(first + r));
      const int key = begin + lane;
      const float x = key >= seen.begin && key < seen.end ? score.of(s[r]) : -INFINITY;
      const float most = warp_max(x > largest[r] ? x : largest[r]);
      const float shift = most == -INFINITY ? 0.0f : most;
      const float weight = expf(x - shift);
      before[r] = expf(largest[r] - shift);
      largest[r] = most;
      sum[r] = sum[r] * before[r] + weight;
      weights[(warp_row + r) * kFloatKeys + lane] = weight;
    }
    sync_warp();
    add_weighted(o, weights + warp_row * kFloatKeys, v, head_dim, before);
  }

  const bool whole = splits.count == 1;
  const Keys rows = head.attending(p);
  const int64_t part = work.split * p.batch * p.heads * p.queries;
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int row = first + r;
    const float total = warp_sum(sum[r]);
    if (row < rows.begin || row >= rows.end) continue;
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t at = part + head.flat(p, row);
    write_row(whole ? head.row<float>(p.out, row) : splits.out + at * p.head_dim, o[r], inverse,
              head_dim);
    if (lane != 0) continue;
    const float shift = largest[r] == -INFINITY ? 0.0f : largest[r];
    (whole ? static_cast<float*>(p.lse) : splits.lse)[at] =
        largest[r] == INFINITY ? largest[r] : shift + logf(total);
  }
}

LONGROPE_MAX_REGISTERS(attention_float_kernel, 128)

}  // namespace

int forward_float_splits(const AttentionParams& p) {
  return split_count(p, kFloatRows, kFloatKeys);
}

void forward_float(const AttentionParams& p, const Splits& splits, cudaStream_t stream) {
  const int stride = float_stride(static_cast<int>(p.head_dim));
  const size_t floats = (kFloatRows + 2 * kFloatKeys) * stride + kFloatRows * kFloatKeys;
  launch("attention", attention_float_kernel, row_tiles(p, kFloatRows) * splits.count,
         kFloatThreads, sizeof(float) * floats, stream, p, splits);
}

}  // namespace cuda
}  // namespace longrope
