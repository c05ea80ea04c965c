// Attention of one to a few queries over a long cache, 16-bit elements: what a token costs.
//
// Formula and arithmetic as in forward.cu. Bounded by reading the keys and values once, so all that
// is done here is to keep many reads under way:
// Mapping: the queries of all heads that share a key/value head are the 16 rows of one product, so
// that keys and values are read once for them. Several blocks share a head, each with a part of its
// keys (splits.cuh), and of that part every warp takes each kWarps-th 16 keys for itself: it copies
// them (cp.async), waits for its own copies alone, and keeps a softmax of its own; while one tile
// is multiplied the next is on its way. There is no barrier until the end, where the warps' results
// are joined in their order.
// Rotation: keys that come un-rotated turn in shared memory, where they are read, by a table of
// cosines and sines (key_table.cu) that all heads share: 8 pairs bytes for a key of a row of the
// batch, where turning them beforehand would write and read every key of every head again.
// Bytes moved: k and v once, the table once for every head, most of it from the second-level cache.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"
#include "common/cuda/rotation.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kKeys = 16;    // of a tile: one step of the second product
constexpr int kStages = 2;   // tiles of a warp, one of which is copied while the other is used
constexpr int kTurning = 4;  // units of 8 pairs that a lane turns at once: 64 registers of sines

// Four tiles a warp of 16 keys and values beside the rows: 72 KiB for head_dim 128, so that two
// blocks share a multiprocessor of an A100 or H100, and 74 KiB for 256 with half the warps.
template <int kHeadDim>
constexpr int kWarps = kHeadDim > 128 ? 2 : 4;

// Distance of rows of float32 results: 8 more than a multiple of 32 banks.
template <int kHeadDim>
constexpr int kPartStride = kHeadDim + 8;

// Turns the keys of a warp's tile, the first `count` of which exist, `key` being the first. Calls
// arrive() when the tile is needed: before that the first sines are on their way.
template <int kStride, typename T, typename Arrive>
__device__ __forceinline__ void turn_keys(T* tile, const KeyTable& table, int64_t batch, int key,
                                          int count, const Arrive& arrive) {
  const int lane = threadIdx.x % 32, units = table.pairs / 8;
  count = count < kKeys ? count : kKeys;
  RowSteps used(units, lane, 32), loaded(units, lane, 32);  // a key's units are its "members"
  for (int done = 0; done < kKeys * units; done += 32 * kTurning) {
    float cos[kTurning][8], sin[kTurning][8];
#pragma unroll
    for (int i = 0; i < kTurning; ++i) {
      if (loaded.query < count) {
        const float* row = table.row(batch, key + loaded.query) + 8 * loaded.member;
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
          const auto c = load<4>(row + half), s = load<4>(row + table.pairs + half);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            cos[i][half + j] = c.values[j];
            sin[i][half + j] = s.values[j];
          }
        }
      }
      loaded.step();
    }
    if (done == 0) arrive();
#pragma unroll
    for (int i = 0; i < kTurning; ++i) {
      if (used.query < count) {
        T* const row = tile + used.query * kStride;
        T* const one = row + (table.interleaved ? 16 : 8) * used.member;
        T* const two = table.interleaved ? one + 8 : one + table.pairs;
        auto x = load<8>(one), y = load<8>(two);
        table.interleaved ? rotate<true>(x, y, cos[i], sin[i])
                          : rotate<false>(x, y, cos[i], sin[i]);
        store(one, x);
        store(two, y);
      }
      used.step();
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps<kHeadDim>)
    decode_kernel(AttentionParams p, Splits splits, KeyTable table) {
  constexpr int kStride = kTileStride<kHeadDim>, kTile = kKeys * kStride;
  constexpr int kApart = kKeys * kWarps<kHeadDim>;  // from one tile of a warp to its next
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const q = reinterpret_cast<T*>(dynamic_shared());
  T* const k = q + kDecodeRows * kStride + warp * 2 * kStages * kTile;  // kStages tiles
  T* const v = k + kStages * kTile;                                     // the same
  const Assignment work(p, kDecodeRows, kApart, splits.count);
  if (work.is_idle) return;
  const Head& head = work.head;
  const Score score(p);

  int begin = work.keys.begin + warp * kKeys;
  using Source = KeySource<kKeys, kHeadDim, 32, T>;
  Source next_keys(p, p.k, head, begin), next_values(p, p.v, head, begin);
  const int64_t skip_keys = (kApart - kKeys) * p.k.token_stride;
  const int64_t skip_values = (kApart - kKeys) * p.v.token_stride;
  const auto copy = [&](int from, int stage) {
    if (from < work.keys.end) {
      next_keys.copy(k + stage * kTile, 0, work.keys.end - from);
      next_values.copy(v + stage * kTile, 0, work.keys.end - from);
      next_keys.skip(skip_keys);
      next_values.skip(skip_values);
    }
    cp_async_commit();  // also of nothing: waits count groups
  };
  if (warp == 0) RowSource<kDecodeRows, kHeadDim, 32, T>(p, p.q, head, 0).copy(q, head.rows);
  copy(begin, 0);
  copy(begin + kApart, 1);
  cp_async_wait<kStages - 1>();
  sync_threads();  // the queries are there

  Keys seen[2];  // by this lane's rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    seen[half] = head.visible.keys(head.query(8 * half + lane / 4));
  }
  float o[1][kHeadDim / 8][4] = {};
  Softmax<1> softmax;
  for (int stage = 0; begin < work.keys.end; begin += kApart, stage ^= 1) {
    T* const tile = k + stage * kTile;
    const auto arrive = [] {
      cp_async_wait<kStages - 1>();
      sync_warp();  // what every lane has copied is there
    };
    if (table.data) {
      turn_keys<kStride>(tile, table, head.batch, begin, work.keys.end - begin, arrive);
      sync_warp();
    } else {
      arrive();
    }
    float s[1][kKeys / 8][4] = {};
    multiply_transposed<kHeadDim>(s, q, tile);
    if (!score.is_product) score.apply(s);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < kKeys / 4; ++e) {
        const int key = begin + e / 2 * 8 + lane % 4 * 2 + e % 2;
        float& x = s[0][e / 2][2 * half + e % 2];
        if (key < seen[half].begin || key >= seen[half].end) x = -INFINITY;
      }
    }
    softmax.add(s, o, score.unit);
    uint32_t weights[1][kKeys / 16][4];
    round_to_left<T>(s[0], weights[0]);
    multiply<kHeadDim>(o, weights, v + stage * kTile);
    sync_warp();  // no lane needs this stage
    copy(begin + kStages * kApart, stage);
  }

  // The union of the warps: [kWarps, kDecodeRows] of largest scores and of sums, then of results.
  float* const largest = reinterpret_cast<float*>(dynamic_shared());
  float* const sums = largest + kWarps<kHeadDim> * kDecodeRows;
  float* const parts = sums + kWarps<kHeadDim> * kDecodeRows;
  sync_threads();  // no warp needs its tiles
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = warp * kDecodeRows + 8 * half + lane / 4;
    const float sum = warp_sum(softmax.sum[0][half], 4);
    if (lane % 4 == 0) {
      largest[at] = softmax.largest[0][half];
      sums[at] = sum;
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      const Pack<float, 2> pair{{o[0][j][2 * half], o[0][j][2 * half + 1]}};
      store(parts + at * kPartStride<kHeadDim> + 8 * j + lane % 4 * 2, pair);
    }
  }
  sync_threads();
  const Keys rows = head.attending(p);
  for (int r = rows.begin + warp; r < rows.end; r += kWarps<kHeadDim>) {
    float most = -INFINITY, sum = 0.0f, factors[kWarps<kHeadDim>];
#pragma unroll
    for (int w = 0; w < kWarps<kHeadDim>; ++w) most = fmaxf(most, largest[w * kDecodeRows + r]);
    const float shift = Softmax<1>::shift_of(most, score.unit);
#pragma unroll
    for (int w = 0; w < kWarps<kHeadDim>; ++w) {
      const int at = w * kDecodeRows + r;
      factors[w] = exp2_approx(fmaf(largest[at], score.unit, -shift));
      sum = fmaf(factors[w], sums[at], sum);
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const bool whole = splits.count == 1;
    const int64_t at = work.split * p.batch * p.heads * p.queries + head.flat(p, r);
    T* const out = head.row<T>(p.out, r);
    for (int c = lane; c < p.head_dim; c += 32) {
      float x = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps<kHeadDim>; ++w) {
        x = fmaf(factors[w], parts[(w * kDecodeRows + r) * kPartStride<kHeadDim> + c], x);
      }
      if (whole) {
        out[c] = from_float<T>(x * inverse);
      } else {
        splits.out[at * p.head_dim + c] = x * inverse;
      }
    }
    if (lane == 0) {
      (whole ? static_cast<float*>(p.lse) : splits.lse)[at] =
          most == INFINITY ? most : kLn2 * shift + logf(sum);
    }
  }
}

LONGROPE_MAX_REGISTERS(decode_kernel, 255)

template <typename T, int kHeadDim>
void run(const AttentionParams& p, const Splits& splits, const KeyTable& table,
         cudaStream_t stream) {
  constexpr int kTiles = 2 * kStages * kWarps<kHeadDim>;
  constexpr size_t kBytes = sizeof(T) * (kDecodeRows + kTiles * kKeys) * kTileStride<kHeadDim>;
  constexpr size_t kPartBytes =
      sizeof(float) * kWarps<kHeadDim> * kDecodeRows * (2 + kPartStride<kHeadDim>);
  static_assert(kBytes <= kSharedBytesEverywhere && kPartBytes <= kBytes);
  launch("attention", decode_kernel<T, kHeadDim>, row_tiles(p, kDecodeRows) * splits.count,
         32 * kWarps<kHeadDim>, kBytes, stream, p, splits, table);
}

}  // namespace

int decode_splits(const AttentionParams& p) {
  return for_head_dim(p.head_dim, [&](auto size) {
    return split_count(p, kDecodeRows, kKeys * kWarps<size.value>);
  });
}

void decode(const AttentionParams& p, const Splits& splits, const KeyTable& table,
            cudaStream_t stream) {
  for_head_dim(p.head_dim, [&](auto size) {
    p.dtype == DType::kBFloat16 ? run<bf16, size.value>(p, splits, table, stream)
                                : run<f16, size.value>(p, splits, table, stream);
  });
}

}  // namespace cuda
}  // namespace longrope
