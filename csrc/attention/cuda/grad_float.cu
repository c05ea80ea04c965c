// Gradients of float32 attention, in float32 throughout: correct and plain, not fast.
//
// Formula: AttentionBackwardParams in csrc/attention/attention.h; the weights are computed again in
// both kernels. Accumulation: float32, in sums of at most 32 terms that are added up, in one order.
// Mapping: a block of four warps takes 16 rows (for dQ) or 16 keys (for dK and dV) of one key/value
// head and walks through the keys that they see, or the rows that see them, 32 at a time. For the
// weights a lane takes one of the 32, for the gradients a column of every 32; a warp keeps four.
// Bytes moved: what a block takes once, what it walks through once for every block that does.
#include "attention/cuda/float_tile.cuh"
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

// The gradient of the product of a row and a key (without scale) in the place of that of the weight
// (dP), and the weight.
__device__ __forceinline__ float weigh(const FloatScore& score, float product, float& grad,
                                       bool is_seen, float lse, float delta) {
  const float x = score.of(product), t = score.cap != 0.0f ? x / score.cap : 0.0f;
  const float weight = is_seen && lse != -INFINITY ? expf(x - lse) : 0.0f;
  grad = is_seen ? weight * (grad - delta) * (1.0f - t * t) : 0.0f;
  return weight;
}

__global__ void __launch_bounds__(kFloatThreads)
    grad_queries_float_kernel(AttentionBackwardParams g, RowTerms terms) {
  const AttentionParams& p = g.forward;
  const int head_dim = static_cast<int>(p.head_dim), stride = float_stride(head_dim);
  const Assignment work(p, kFloatRows, kFloatKeys, 1);
  const Head& head = work.head;
  auto* const q = reinterpret_cast<float*>(dynamic_shared());  // [kFloatRows, stride]
  float* const grad_out = q + kFloatRows * stride;             // the same
  float* const k = grad_out + kFloatRows * stride;             // [kFloatKeys, stride]
  float* const v = k + kFloatKeys * stride;                    // the same
  float* const weights = v + kFloatKeys * stride;              // [kFloatRows, kFloatKeys]
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kRowsOfWarp;
  const int first = work.first_row + warp_row;
  const FloatScore score(p);
  const float* const lse = static_cast<const float*>(p.lse);

  const auto row_at = [&](const AttentionTensor& x, int r) {
    r += work.first_row;
    return r < head.rows ? head.row<const float>(x, r) : nullptr;
  };
  read_rows(q, kFloatRows, head_dim, [&](int r) { return row_at(p.q, r); });
  read_rows(grad_out, kFloatRows, head_dim, [&](int r) { return row_at(g.grad_out, r); });
  float dq[kRowsOfWarp][kFloatColumns] = {};
  for (int begin = work.keys.begin; begin < work.keys.end; begin += kFloatKeys) {
    const auto key_at = [&](const AttentionTensor& x, int key) {
      return begin + key < work.keys.end ? head.key<const float>(x, begin + key) : nullptr;
    };
    sync_threads();  // no warp needs the last tile
    read_rows(k, kFloatKeys, head_dim, [&](int key) { return key_at(p.k, key); });
    read_rows(v, kFloatKeys, head_dim, [&](int key) { return key_at(p.v, key); });
    sync_threads();
    float s[kRowsOfWarp], ds[kRowsOfWarp];
    products(s, q + warp_row * stride, k + lane * stride, head_dim);
    products(ds, grad_out + warp_row * stride, v + lane * stride, head_dim);
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const Keys seen = head.visible.keys(head.query(first + r));
      const int key = begin + lane;
      const bool is_seen = first + r < head.rows && key >= seen.begin && key < seen.end;
      const int64_t at = is_seen ? head.flat(p, first + r) : 0;
      weigh(score, s[r], ds[r], is_seen, lse[at], terms.delta[at]);
      weights[(warp_row + r) * kFloatKeys + lane] = ds[r];
    }
    sync_warp();
    add_weighted(dq, weights + warp_row * kFloatKeys, k, head_dim);
  }
  const Keys rows = head.attending(p);
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    if (first + r >= head.rows) break;
    if (first + r < rows.begin || first + r >= rows.end) {
#pragma unroll
      for (int c = 0; c < kFloatColumns; ++c) dq[r][c] = 0.0f;
    }
    write_row(head.row<float>(g.grad_q, first + r), dq[r], static_cast<float>(p.scale), head_dim);
  }
}

__global__ void __launch_bounds__(kFloatThreads)
    grad_keys_float_kernel(AttentionBackwardParams g, RowTerms terms) {
  const AttentionParams& p = g.forward;
  const int head_dim = static_cast<int>(p.head_dim), stride = float_stride(head_dim);
  const auto tiles = static_cast<unsigned>(ceil_div<int64_t>(p.keys, kFloatRows));
  const Head head(p, blockIdx.x / tiles);
  const int block_key = static_cast<int>(blockIdx.x % tiles) * kFloatRows;
  auto* const k = reinterpret_cast<float*>(dynamic_shared());  // [kFloatRows, stride]
  float* const v = k + kFloatRows * stride;                    // the same
  float* const q = v + kFloatRows * stride;                    // [kFloatKeys, stride]
  float* const grad_out = q + kFloatKeys * stride;             // the same
  float* const weights = grad_out + kFloatKeys * stride;       // [kFloatRows, kFloatKeys]
  const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * kRowsOfWarp;
  const int first_key = block_key + warp_key;
  const FloatScore score(p);
  const float* const lse = static_cast<const float*>(p.lse);

  // Keys that some query of the row of the batch sees, and the rows that see keys of this block:
  // what nobody sees, and rows that see nothing, may hold anything.
  const Keys all = attending(p, head.batch);
  const Keys used = all.begin < all.end ? head.visible.keys(all.begin, all.end - 1) : Keys{0, 0};
  const Keys queries = head.visible.queries(block_key, block_key + kFloatRows, all);
  const int end = queries.end * head.group;
  const auto key_at = [&](const AttentionTensor& x, int key) {
    key += block_key;
    return key >= used.begin && key < used.end ? head.key<const float>(x, key) : nullptr;
  };
  read_rows(k, kFloatRows, head_dim, [&](int key) { return key_at(p.k, key); });
  read_rows(v, kFloatRows, head_dim, [&](int key) { return key_at(p.v, key); });
  float dk[kRowsOfWarp][kFloatColumns] = {}, dv[kRowsOfWarp][kFloatColumns] = {};
  for (int begin = queries.begin * head.group; begin < end; begin += kFloatKeys) {
    const auto row_at = [&](const AttentionTensor& x, int r) {
      return begin + r < end ? head.row<const float>(x, begin + r) : nullptr;
    };
    sync_threads();  // no warp needs the last tile
    read_rows(q, kFloatKeys, head_dim, [&](int r) { return row_at(p.q, r); });
    read_rows(grad_out, kFloatKeys, head_dim, [&](int r) { return row_at(g.grad_out, r); });
    sync_threads();
    float s[kRowsOfWarp], ds[kRowsOfWarp];
    products(s, k + warp_key * stride, q + lane * stride, head_dim);
    products(ds, v + warp_key * stride, grad_out + lane * stride, head_dim);
    const Keys seen = head.visible.keys(head.query(begin + lane));
    const int64_t at = begin + lane < end ? head.flat(p, begin + lane) : 0;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int key = first_key + r;
      const bool is_seen = begin + lane < end && key >= seen.begin && key < seen.end;
      const float weight = weigh(score, s[r], ds[r], is_seen, lse[at], terms.delta[at]);
      weights[(warp_key + r) * kFloatKeys + lane] = weight;
    }
    sync_warp();
    add_weighted(dv, weights + warp_key * kFloatKeys, grad_out, head_dim);
    sync_warp();  // the weights are used: their gradients take their place
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) weights[(warp_key + r) * kFloatKeys + lane] = ds[r];
    sync_warp();
    add_weighted(dk, weights + warp_key * kFloatKeys, q, head_dim);
  }
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    if (first_key + r >= p.keys) break;
    write_row(head.key<float>(g.grad_k, first_key + r), dk[r], static_cast<float>(p.scale),
              head_dim);
    write_row(head.key<float>(g.grad_v, first_key + r), dv[r], 1.0f, head_dim);
  }
}

// Shared memory of either kernel: two operands of the block, two of the tile, and weights.
constexpr size_t float_bytes(int head_dim) {
  return sizeof(float) *
         (2 * (kFloatRows + kFloatKeys) * float_stride(head_dim) + kFloatRows * kFloatKeys);
}

LONGROPE_MAX_REGISTERS(grad_queries_float_kernel, 128)
LONGROPE_MAX_REGISTERS(grad_keys_float_kernel, 128)

}  // namespace

void grad_float(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  // 98.4 KiB for head_dim 256: kSharedBytesEverywhere is what these tiles were chosen for.
  static_assert(float_bytes(kMaxHeadDim) <= kSharedBytesEverywhere);
  const size_t bytes = float_bytes(static_cast<int>(p.head_dim));
  launch("attention_backward", grad_queries_float_kernel, row_tiles(p, kFloatRows), kFloatThreads,
         bytes, stream, g, terms);
  const int64_t tiles = ceil_div<int64_t>(p.keys, kFloatRows);
  launch("attention_backward", grad_keys_float_kernel, tiles * p.kv_heads * p.batch, kFloatThreads,
         bytes, stream, g, terms);
}

}  // namespace cuda
}  // namespace longrope
