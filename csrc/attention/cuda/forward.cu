// Attention of 16-bit elements on tensor cores (mma.sync, from sm_80 on).
//
// Formula: csrc/attention/attention.h by the algorithm of FlashAttention-2 (arXiv 2307.08691): for
// every tile of keys
//   S = Q K^T,  m' = max(m, S),  P = exp(S - m'),  O = exp(m - m') O + P V,  l = exp(m - m') l +
//   ...
// and out = O / l, lse = m + log l at the end. Powers of two throughout.
// Accumulation: S, O, m and l in float32 registers; P rounded to the element type for the second
// product, from the registers where the first one left it.
// Mapping: a block of four warps takes 128 rows (64 for head_dim 256) of one key/value head, a row
// being a query of one of the heads that share it, and walks through the keys that these rows see
// in tiles of 64 or 32; every warp keeps its own rows. Tiles beyond the causal bound, the window or
// the lengths are not visited, and only tiles on a bound are masked. While S is computed the values
// are copied (cp.async), while the values are multiplied the next keys. Where blocks are few,
// several share the rows of one (splits.cuh). Bytes moved: q and out once, k and v once for every
// block of a head: 2 (H N D) + 2 Hk M D ceil(rows / 128) elements for M keys seen by all rows, half
// of the second term where causal and N = M, most of it from the second-level cache.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Rows of a warp in sixteens, and keys of a tile: two sixteens share what is loaded of keys and
// values. As much of both as registers hold without spilling.
template <int kHeadDim>
constexpr int kSixteens = kHeadDim > 128 ? 1 : 2;
template <int kHeadDim>
constexpr int kTileKeys = kHeadDim == 96 || kHeadDim == 128 ? 32 : 64;
template <int kHeadDim>
constexpr int kRows = 16 * kWarps * kSixteens<kHeadDim>;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(AttentionParams p, Splits splits, bool packed) {
  constexpr int kM = kSixteens<kHeadDim>, kKeys = kTileKeys<kHeadDim>;
  constexpr int kStride = kTileStride<kHeadDim>;
  T* const q = reinterpret_cast<T*>(dynamic_shared());
  T* const k = q + kRows<kHeadDim> * kStride;
  T* const v = k + kKeys * kStride;
  const Assignment work(p, kRows<kHeadDim>, kKeys, splits.count);
  if (work.is_idle) return;
  const Head& head = work.head;
  const int head_dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * 16 * kM, first = work.first_row + warp_row;
  const Score score(p);

  KeySource<kKeys, kHeadDim, kThreads, T> next_keys(p, p.k, head, work.keys.begin);
  KeySource<kKeys, kHeadDim, kThreads, T> next_values(p, p.v, head, work.keys.begin);
  if (work.keys.begin < work.keys.end) {
    RowSource<kRows<kHeadDim>, kHeadDim, kThreads, T>(p, p.q, head, work.first_row)
        .copy(q, head.rows - work.first_row);
    next_keys.copy(k, 0, work.keys.end - work.keys.begin);
    cp_async_commit();
  }

  // What this warp's rows see, all of them and each.
  const Keys some = first < head.rows ? head.keys(first, 16 * kM) : Keys{0, 0};
  const Keys every{head.visible.keys(head.query(first + 16 * kM - 1)).begin,
                   head.visible.keys(head.query(first)).end};
  float o[kM][kHeadDim / 8][4] = {};
  Softmax<kM> softmax;
  for (int begin = work.keys.begin; begin < work.keys.end; begin += kKeys) {
    cp_async_wait<0>();
    sync_threads();  // the keys are there, and no warp needs the values of the last tile
    next_values.copy(v, 0, work.keys.end - begin);
    cp_async_commit();
    const bool busy = begin < some.end && begin + kKeys > some.begin;
    float s[kM][kKeys / 8][4] = {};
    if (busy) multiply_transposed<kHeadDim>(s, q + warp_row * kStride, k);
    cp_async_wait<0>();
    sync_threads();  // the values are there, and no warp needs the keys
    if (begin + kKeys < work.keys.end) {
      next_keys.copy(k, 0, work.keys.end - begin - kKeys);
      cp_async_commit();
    }
    if (!busy) continue;

    if (!score.is_product) score.apply(s);
    if (begin < every.begin || begin + kKeys > every.end) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first + 16 * i + 8 * half + lane / 4;
          const Keys seen = head.visible.keys(head.query(row));
#pragma unroll
          for (int e = 0; e < kKeys / 4; ++e) {
            const int key = begin + e / 2 * 8 + lane % 4 * 2 + e % 2;
            float& x = s[i][e / 2][2 * half + e % 2];
            if (key < seen.begin || key >= seen.end) x = -INFINITY;
          }
        }
      }
    }
    softmax.add(s, o, score.unit);
    uint32_t weights[kM][kKeys / 16][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) round_to_left<T>(s[i], weights[i]);
    multiply<kHeadDim>(o, weights, v);
  }
  if (first >= head.rows) return;

  float inverse[kM][2], lse[kM][2];
  softmax.finish(score.unit, inverse, lse);
  const Keys rows = head.attending(p);
  float* const all_lse = splits.count > 1 ? splits.lse : static_cast<float*>(p.lse);
  const int64_t part = work.split * p.batch * p.heads * p.queries;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * i + 8 * half + lane / 4;
      if (row < rows.begin || row >= rows.end) continue;
      const int64_t at = part + head.flat(p, row);
      if (lane % 4 == 0) all_lse[at] = lse[i][half];
      if (splits.count == 1) continue;
      float* out = splits.out + at * p.head_dim;
#pragma unroll
      for (int e = 0; e < kHeadDim / 4; ++e) {
        const int column = e / 2 * 8 + lane % 4 * 2 + e % 2;
        if (column < head_dim) out[column] = o[i][e / 2][2 * half + e % 2] * inverse[i][half];
      }
    }
  }
  if (splits.count == 1) {
    write_rows<kHeadDim>(q + warp_row * kStride, o, inverse, head_dim, packed, [&](int r) {
      const int row = first + r;
      return row >= rows.begin && row < rows.end ? head.row<T>(p.out, row) : nullptr;
    });
  }
}

LONGROPE_MAX_REGISTERS(attention_kernel, 255)

template <typename T, int kHeadDim>
void run(const AttentionParams& p, const Splits& splits, cudaStream_t stream) {
  constexpr size_t kBytes =
      sizeof(T) * (kRows<kHeadDim> + 2 * kTileKeys<kHeadDim>)*kTileStride<kHeadDim>;
  static_assert(kBytes <= kSharedBytesEverywhere);
  launch("attention", attention_kernel<T, kHeadDim>, row_tiles(p, kRows<kHeadDim>) * splits.count,
         kThreads, kBytes, stream, p, splits, is_packed(p.out, p));
}

}  // namespace

int forward_16_bit_splits(const AttentionParams& p) {
  return for_head_dim(p.head_dim, [&](auto size) {
    return split_count(p, kRows<size.value>, kTileKeys<size.value>);
  });
}

void forward_16_bit(const AttentionParams& p, const Splits& splits, cudaStream_t stream) {
  for_head_dim(p.head_dim, [&](auto size) {
    p.dtype == DType::kBFloat16 ? run<bf16, size.value>(p, splits, stream)
                                : run<f16, size.value>(p, splits, stream);
  });
}

}  // namespace cuda
}  // namespace longrope
