// Gradients of queries of 16-bit elements on tensor cores (mma.sync, from sm_80 on).
//
// Formula (AttentionBackwardParams in csrc/attention/attention.h); for every tile of keys
//   S = Q K^T,  P = exp(score(S) - lse),  dP = dOut V^T,  dS = P (dP - delta),  dQ += dS K
// Accumulation: float32 registers; dS rounded to the element type for the last product.
// Mapping: a block of four warps takes 64 rows of one key/value head, a row being a query of one of
// the heads that share it, and walks through the keys that these rows see, 32 (16) at a time. S and
// dP are computed again here rather than dQ added up by grad_keys.cu: that takes seven products
// instead of five and neither atomics, whose order changes, nor a sum for every tile of keys in
// memory. While one tile of keys is multiplied the next is copied (cp.async). Bytes moved: q, dOut
// and dQ once, k and v once for every 64 rows that see them (half of them where causal), most of it
// from the second-level cache.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of a block

// Keys of a tile. Two tiles of keys and two of values beside 64 rows of q and dOut take 66 KiB for
// head_dim 128; for 256 half as many keep it at 99 KiB, which every chip from sm_80 on grants.
template <int kHeadDim>
constexpr int kTileKeys = kHeadDim > 128 ? 16 : 32;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    grad_queries_kernel(AttentionBackwardParams g, RowTerms terms, bool packed) {
  constexpr int kKeys = kTileKeys<kHeadDim>;
  constexpr int kStride = kTileStride<kHeadDim>, kTile = kKeys * kStride;
  T* const q = reinterpret_cast<T*>(dynamic_shared());
  T* const grad_out = q + kRows * kStride;
  T* const k = grad_out + kRows * kStride;  // two tiles
  T* const v = k + 2 * kTile;               // two tiles

  const AttentionParams& p = g.forward;
  const Assignment work(p, kRows, kKeys, 1);
  const Head& head = work.head;
  const int head_dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * 16, first = work.first_row + warp_row;
  const Score score(p);

  KeySource<kKeys, kHeadDim, kThreads, T> next_keys(p, p.k, head, work.keys.begin);
  KeySource<kKeys, kHeadDim, kThreads, T> next_values(p, p.v, head, work.keys.begin);
  const auto copy_keys = [&](int buffer, int begin) {
    next_keys.copy(k + buffer * kTile, 0, work.keys.end - begin);
    next_values.copy(v + buffer * kTile, 0, work.keys.end - begin);
    cp_async_commit();
  };
  if (work.keys.begin < work.keys.end) {
    using Rows = RowSource<kRows, kHeadDim, kThreads, T>;
    const int count = head.rows - work.first_row;
    Rows(p, p.q, head, work.first_row).copy(q, count);
    Rows(p, g.grad_out, head, work.first_row).copy(grad_out, count);
    copy_keys(0, work.keys.begin);
  }

  const Keys rows = head.attending(p);
  Keys seen[2] = {};  // by this lane's rows
  float log2_sum[2] = {INFINITY, INFINITY}, delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half + lane / 4;
    if (row < rows.begin || row >= rows.end) continue;
    seen[half] = head.visible.keys(head.query(row));
    log2_sum[half] = terms.log2_sum[head.flat(p, row)];
    delta[half] = terms.delta[head.flat(p, row)];
  }
  float dq[1][kHeadDim / 8][4] = {};
  int buffer = 0;
  for (int begin = work.keys.begin; begin < work.keys.end; begin += kKeys, buffer ^= 1) {
    cp_async_wait<0>();
    sync_threads();  // this tile is there, and no warp needs the one before
    if (begin + kKeys < work.keys.end) copy_keys(buffer ^ 1, begin + kKeys);
    float s[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {};
    multiply_transposed<kHeadDim>(s, q + warp_row * kStride, k + buffer * kTile);
    multiply_transposed<kHeadDim>(ds, grad_out + warp_row * kStride, v + buffer * kTile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < kKeys / 4; ++e) {
        const int key = begin + e / 2 * 8 + lane % 4 * 2 + e % 2;
        float &x = s[0][e / 2][2 * half + e % 2], &dx = ds[0][e / 2][2 * half + e % 2];
        score.weigh(x, dx, log2_sum[half], delta[half]);
        if (key < seen[half].begin || key >= seen[half].end) dx = 0.0f;
      }
    }
    uint32_t weights[1][kKeys / 16][4];
    round_to_left<T>(ds[0], weights[0]);
    multiply<kHeadDim>(dq, weights, k + buffer * kTile);
  }

  const auto scale = static_cast<float>(p.scale);
  const float factors[1][2] = {{scale, scale}};
  write_rows<kHeadDim>(q + warp_row * kStride, dq, factors, head_dim, packed, [&](int r) {
    return first + r < head.rows ? head.row<T>(g.grad_q, first + r) : nullptr;
  });
}

LONGROPE_MAX_REGISTERS(grad_queries_kernel, 255)

template <typename T, int kHeadDim>
void run(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  constexpr size_t kBytes = sizeof(T) * (2 * kRows + 4 * kTileKeys<kHeadDim>)*kTileStride<kHeadDim>;
  static_assert(kBytes <= kSharedBytesEverywhere);
  launch("attention_backward", grad_queries_kernel<T, kHeadDim>, row_tiles(p, kRows), kThreads,
         kBytes, stream, g, terms, is_packed(g.grad_q, p));
}

}  // namespace

void grad_queries_16_bit(const AttentionBackwardParams& g, const RowTerms& terms,
                         cudaStream_t stream) {
  for_head_dim(g.forward.head_dim, [&](auto size) {
    g.forward.dtype == DType::kBFloat16 ? run<bf16, size.value>(g, terms, stream)
                                        : run<f16, size.value>(g, terms, stream);
  });
}

}  // namespace cuda
}  // namespace longrope
