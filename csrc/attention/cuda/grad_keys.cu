// Gradients of keys and values of 16-bit elements on tensor cores (mma.sync, from sm_80 on).
//
// Formula (AttentionBackwardParams in csrc/attention/attention.h), transposed, so that weights
// leave the first products as the second ones take them; for every tile of rows
//   S^T = K Q^T,  P^T = exp(score(S^T) - lse),  dP^T = V dOut^T,  dS^T = P^T (dP^T - delta)
//   dV += P^T dOut,  dK += dS^T Q
// Accumulation: float32 registers; P and dS rounded to the element type for the second products.
// Mapping: a block of four warps takes 64 keys of one key/value head (and 128 columns of the
// gradients: for head_dim 256 two blocks compute the same weights) and walks through the rows that
// see them, 32 at a time, a row being a query of one of the heads that share the keys: their sum is
// taken in this order, so results are the same on every run. While one tile of rows is multiplied
// the next is copied (cp.async).
// Bytes moved: k, v and their gradients once, q and dOut once for every 64 keys that their rows see
// (half of them where causal), most of it from the second-level cache.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 16 * kWarps;  // of a block
constexpr int kRows = 32;           // of a tile

template <int kHeadDim>
constexpr int kColumns = kHeadDim < 128 ? kHeadDim : 128;  // of a block

struct Row {
  float log2_sum, delta;
  int begin, end;  // the keys that it sees
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    grad_keys_kernel(AttentionBackwardParams g, RowTerms terms, bool packed) {
  constexpr int kStride = kTileStride<kHeadDim>, kChunks = kHeadDim / kColumns<kHeadDim>;
  constexpr int kTile = kRows * kStride;
  LONGROPE_SHARED(Row, row_terms, 2 * kRows);  // two tiles, as of q and grad_out
  T* const k = reinterpret_cast<T*>(dynamic_shared());
  T* const v = k + kKeys * kStride;
  T* const q = v + kKeys * kStride;
  T* const grad_out = q + 2 * kTile;

  const AttentionParams& p = g.forward;
  const auto tiles = static_cast<unsigned>(ceil_div<int64_t>(p.keys, kKeys)) * kChunks;
  const Head head(p, blockIdx.x / tiles);
  const int first_key = static_cast<int>(blockIdx.x % tiles / kChunks) * kKeys;
  const int first_column = static_cast<int>(blockIdx.x % kChunks) * kColumns<kHeadDim>;
  const int head_dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32;
  const int warp_key = threadIdx.x / 32 * 16;
  const Score score(p);
  const Divider by_group(static_cast<unsigned>(head.group));

  // Keys that some query of the row of the batch sees, and the rows that see keys of this tile:
  // what nobody sees, and rows that see nothing, may hold anything.
  const Keys all = attending(p, head.batch);
  const Keys used = all.begin < all.end ? head.visible.keys(all.begin, all.end - 1) : Keys{0, 0};
  const Keys queries = head.visible.queries(first_key, first_key + kKeys, all);
  const int begin = queries.begin * head.group, end = queries.end * head.group;

  const auto copy_keys = [&](T* tile, const AttentionTensor& x) {
    copy_tile<kKeys, kHeadDim, kThreads>(tile, head_dim, static_cast<const T*>(x.data), [&](int r) {
      const int key = first_key + r;
      return key >= used.begin && key < used.end ? head.key<const T>(x, key) : nullptr;
    });
  };
  const auto copy_rows = [&](int buffer, int first) {
    const auto copy = [&](T* tile, const AttentionTensor& x) {
      copy_tile<kRows, kHeadDim, kThreads>(
          tile + buffer * kTile, head_dim, static_cast<const T*>(x.data),
          [&](int r) { return first + r < end ? head.row<const T>(x, first + r) : nullptr; });
    };
    copy(q, p.q);
    copy(grad_out, g.grad_out);
    cp_async_commit();
    if (threadIdx.x < kRows) {
      const int row = first + threadIdx.x;
      const Keys seen = head.visible.keys(head.query(row));
      Row mine{INFINITY, 0.0f, seen.begin, seen.end};
      if (row < end) {
        const int64_t at = head.flat(p, row);
        mine.log2_sum = terms.log2_sum[at];
        mine.delta = terms.delta[at];
      }
      row_terms[buffer * kRows + threadIdx.x] = mine;
    }
  };
  if (begin < end) {
    copy_keys(k, p.k);
    copy_keys(v, p.v);
    copy_rows(0, begin);
  }

  float dk[1][kColumns<kHeadDim> / 8][4] = {}, dv[1][kColumns<kHeadDim> / 8][4] = {};
  int buffer = 0;
  for (int first = begin; first < end; first += kRows, buffer ^= 1) {
    cp_async_wait<0>();
    sync_threads();  // this tile is there, and no warp needs the one before
    if (first + kRows < end) copy_rows(buffer ^ 1, first + kRows);
    float s[1][kRows / 8][4] = {}, ds[1][kRows / 8][4] = {};
    multiply_transposed<kHeadDim>(s, k + warp_key * kStride, q + buffer * kTile);
    multiply_transposed<kHeadDim>(ds, v + warp_key * kStride, grad_out + buffer * kTile);
    const bool is_inside = first_key >= head.visible.keys(head.query(first + kRows - 1)).begin &&
                           first_key + kKeys <= head.visible.keys(head.query(first)).end;
#pragma unroll
    for (int j = 0; j < kRows / 4; ++j) {
      const Row& row = row_terms[buffer * kRows + j / 2 * 8 + lane % 4 * 2 + j % 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &x = s[0][j / 2][2 * half + j % 2], &dx = ds[0][j / 2][2 * half + j % 2];
        score.weigh(x, dx, row.log2_sum, row.delta);
        const int key = first_key + warp_key + 8 * half + lane / 4;
        if (!is_inside && (key < row.begin || key >= row.end)) x = dx = 0.0f;
      }
    }
    uint32_t weights[1][kRows / 16][4];
    round_to_left<T>(s[0], weights[0]);
    multiply<kHeadDim>(dv, weights, grad_out + buffer * kTile + first_column);
    round_to_left<T>(ds[0], weights[0]);
    multiply<kHeadDim>(dk, weights, q + buffer * kTile + first_column);
  }

  const auto write = [&](T* tile, const auto& grad, const AttentionTensor& x, float factor) {
    const float factors[1][2] = {{factor, factor}};
    write_rows<kHeadDim>(tile + warp_key * kStride + first_column, grad, factors,
                         head_dim - first_column, packed, [&](int r) {
                           const int key = first_key + warp_key + r;
                           return key < p.keys ? head.key<T>(x, key) + first_column : nullptr;
                         });
  };
  write(k, dk, g.grad_k, static_cast<float>(p.scale));
  write(v, dv, g.grad_v, 1.0f);
}

LONGROPE_MAX_REGISTERS(grad_keys_kernel, 255)

template <typename T, int kHeadDim>
void run(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  const size_t bytes = sizeof(T) * (2 * kKeys + 4 * kRows) * kTileStride<kHeadDim>;
  const int64_t tiles = ceil_div<int64_t>(p.keys, kKeys) * (kHeadDim / kColumns<kHeadDim>);
  launch("attention_backward", grad_keys_kernel<T, kHeadDim>,
         dim3(static_cast<unsigned>(tiles * p.kv_heads * p.batch)), dim3(kThreads), bytes, stream,
         g, terms, writes_packed(g.grad_k, p) && writes_packed(g.grad_v, p));
}

}  // namespace

void grad_keys_16_bit(const AttentionBackwardParams& g, const RowTerms& terms,
                      cudaStream_t stream) {
  for_head_dim(g.forward.head_dim, [&](auto size) {
    g.forward.dtype == DType::kBFloat16 ? run<bf16, size.value>(g, terms, stream)
                                        : run<f16, size.value>(g, terms, stream);
  });
}

}  // namespace cuda
}  // namespace longrope
