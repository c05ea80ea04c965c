// Gradients of keys and values of 16-bit elements on tensor cores (mma.sync, from sm_80 on).
//
// Formula (AttentionBackwardParams in csrc/attention/attention.h), transposed, so that weights
// leave the first products as the second ones take them; for every tile of rows
//   S^T = K Q^T,  P^T = exp(score(S^T) - lse),  dP^T = V dOut^T,  dS^T = P^T (dP^T - delta)
//   dV += P^T dOut,  dK += dS^T Q
// Accumulation: float32 registers; P and dS rounded to the element type for the second products.
// Mapping: a block of four warps takes 64 keys of one key/value head (and 128 columns of the
// gradients: for head_dim 256 two blocks compute the same weights) and walks through the rows that
// see them, 32 (16) at a time, a row being a query of one of the heads that share the keys: their
// sum is taken in this order, so results are the same on every run. While one tile of rows is
// multiplied the next is copied (cp.async). Bytes moved: k, v and their gradients once, q and dOut
// once for every 64 keys that their rows see (half of them where causal), most of it from the
// second-level cache.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 16 * kWarps;  // of a block

// Rows of a tile. Two tiles of q and two of dOut beside 64 keys and values take 66 KiB for head_dim
// 128; for 256 half as many keep it at 99 KiB, which every chip from sm_80 on grants.
template <int kHeadDim>
constexpr int kTileRows = kHeadDim > 128 ? 16 : 32;

template <int kHeadDim>
constexpr int kColumns = kHeadDim < 128 ? kHeadDim : 128;  // of a block

// What a tile holds of each row besides q and dOut. It lies behind the row of q, in the 16 bytes
// that keep rows in different banks and that nothing else uses.
struct alignas(16) Row {
  float log2_sum, delta;
  int begin, end;  // the keys that it sees
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    grad_keys_kernel(AttentionBackwardParams g, RowTerms terms, bool packed) {
  constexpr int kStride = kTileStride<kHeadDim>, kChunks = kHeadDim / kColumns<kHeadDim>;
  constexpr int kRows = kTileRows<kHeadDim>, kTile = kRows * kStride;
  static_assert(sizeof(T) * (kStride - kHeadDim) == sizeof(Row));
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

  // Keys that some query of the row of the batch sees, and the rows that see keys of this tile:
  // what nobody sees, and rows that see nothing, may hold anything.
  const Keys all = attending(p, head.batch);
  const Keys used = all.begin < all.end ? head.visible.keys(all.begin, all.end - 1) : Keys{0, 0};
  const Keys queries = head.visible.queries(first_key, first_key + kKeys, all);
  const int begin = queries.begin * head.group, end = queries.end * head.group;

  using Rows = RowSource<kRows, kHeadDim, kThreads, T>;
  Rows next_q(p, p.q, head, begin), next_grad_out(p, g.grad_out, head, begin);
  RowSteps mine(head.group, begin + static_cast<int>(threadIdx.x),
                kRows);  // of the first kRows threads
  const auto terms_of = [&](int buffer, int r) -> Row& {
    return *reinterpret_cast<Row*>(q + buffer * kTile + r * kStride + kHeadDim);
  };
  const auto copy_rows = [&](int buffer, int first) {
    next_q.copy(q + buffer * kTile, end - first);
    next_grad_out.copy(grad_out + buffer * kTile, end - first);
    cp_async_commit();
    if (threadIdx.x < kRows) {
      const Keys seen = head.visible.keys(mine.query);
      Row row{INFINITY, 0.0f, seen.begin, seen.end};
      if (first + static_cast<int>(threadIdx.x) < end) {
        const int64_t at = head.flat(p, mine);
        row.log2_sum = terms.log2_sum[at];
        row.delta = terms.delta[at];
      }
      terms_of(buffer, threadIdx.x) = row;
      mine.step();
    }
  };
  if (begin < end) {
    using Copies = KeySource<kKeys, kHeadDim, kThreads, T>;
    const int from = used.begin - first_key, to = used.end - first_key;
    Copies(p, p.k, head, first_key).copy(k, from, to);
    Copies(p, p.v, head, first_key).copy(v, from, to);
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
    const bool is_inside = first_key >= terms_of(buffer, kRows - 1).begin &&
                           first_key + kKeys <= terms_of(buffer, 0).end;
#pragma unroll
    for (int j = 0; j < kRows / 4; ++j) {
      const Row row = terms_of(buffer, j / 2 * 8 + lane % 4 * 2 + j % 2);
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
  constexpr size_t kBytes = sizeof(T) * (2 * kKeys + 4 * kTileRows<kHeadDim>)*kTileStride<kHeadDim>;
  static_assert(kBytes <= kSharedBytesEverywhere);
  const int64_t tiles = ceil_div<int64_t>(p.keys, kKeys) * (kHeadDim / kColumns<kHeadDim>);
  launch("attention_backward", grad_keys_kernel<T, kHeadDim>, tiles * p.kv_heads * p.batch,
         kThreads, kBytes, stream, g, terms, is_packed(g.grad_k, p) && is_packed(g.grad_v, p));
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
