// Gradients of queries of 16-bit elements on compute capability 9.0 (wgmma, bulk copies of tensor
// tiles).
//
// Formula and accumulation: those of ../grad_queries.cu.
// Mapping: a block takes 128 queries of one head (192 for head_dim to 64), 64 to each of its
// consumer warpgroups, and walks through the keys that they see, 64 at a time. One more warpgroup
// copies: q and dOut once, keys and values into a ring. For every tile of keys a consumer does
//
//   begin S = Q K^T    begin dP = dOut V^T    wait for S and for dQ of the tile before, free it
//   P    wait for dP    dS, rounded in registers    begin dQ += dS K
//
// Tiles begin at the first key that the block sees. Behind the last one keys may hold anything:
// they are made zeros (0 times NaN is NaN). What queries hold that see nothing stays in their own
// rows, and what values hold that nobody sees in scores of their own; both are masked. Bytes moved:
// q, dOut and dQ once, k and v once for every 128 queries that see them (half of them where
// causal), most of it from the second-level cache.
#include "attention/cuda/sm90/grads.cuh"
#include "attention/cuda/sm90/query_block.cuh"

namespace longrope {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kKeys = 64;   // of a tile
constexpr int kStages = 4;  // of 64 keys and values: with q and dOut 193 KiB at head_dim 128

template <int kHeadDim>
struct Size {
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;  // warpgroups
  static constexpr int kConsumerThreads = kWarpgroup * kConsumers;
  static constexpr int kThreads = kWarpgroup + kConsumerThreads;
  static constexpr int kRows = 64 * kConsumers;
  // Consumers take what the copying warpgroup gives up. The sums of dQ, S and dP and the rounded dS
  // are 112 or 144 of theirs.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (kConsumers + 1) * registers_at_entry(kThreads));
};

template <int kHeadDim>
struct Shared {
  using RowTile = Panels<kHeadDim, Size<kHeadDim>::kRows>;
  using KeyTile = Panels<kHeadDim, kKeys>;
  struct Keys {
    KeyTile k, v;
  };

  RowTile q, grad_out;
  Keys keys[kStages];
  uint64_t rows_full, full[kStages], empty[kStages];

  __device__ __forceinline__ void init_barriers() {
    init_barrier(&rows_full, 1);
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&full[i], 1);
      init_barrier(&empty[i], Size<kHeadDim>::kConsumerThreads / 32);  // a lane of every warp
    }
    publish_barriers();
  }
};

// What a block does.
struct Work : QueryBlock {
  int steps;  // tiles of keys

  __device__ __forceinline__ Work(const AttentionParams& p, int rows)
      : QueryBlock(p, rows), steps(tiles(kKeys)) {}
};

// One thread copies.
template <int kHeadDim>
__device__ __forceinline__ void copy_tiles(Shared<kHeadDim>& shared, const Work& work,
                                           const GradMaps& maps) {
  using Shared = Shared<kHeadDim>;
  arrive_expecting(&shared.rows_full, 2 * Shared::RowTile::kBytes);
  shared.q.copy(maps.q, &shared.rows_full, work.first_query, work.head, work.batch);
  shared.grad_out.copy(maps.grad_out, &shared.rows_full, work.first_query, work.head, work.batch);
#pragma unroll 1
  for (int step = 0; step < work.steps; ++step) {
    const int stage = step % kStages, key = work.keys.begin + step * kKeys;
    uint64_t* const full = &shared.full[stage];
    wait_barrier(&shared.empty[stage], step / kStages % 2 ^ 1);
    arrive_expecting(full, 2 * Shared::KeyTile::kBytes);
    shared.keys[stage].k.copy(maps.k, full, key, work.kv_head, work.batch);
    shared.keys[stage].v.copy(maps.v, full, key, work.kv_head, work.batch);
  }
}

template <typename T, int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void consume(Shared<kHeadDim>& shared, const Work& work,
                                        const AttentionBackwardParams& g, const RowTerms& terms,
                                        int group, bool packed) {
  using RowTile = typename Shared<kHeadDim>::RowTile;
  using KeyTile = typename Shared<kHeadDim>::KeyTile;
  constexpr int kConsumerThreads = Size<kHeadDim>::kConsumerThreads;
  const AttentionParams& p = g.forward;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  const int group_query = work.first_query + 64 * group, warp_query = group_query + 16 * warp;
  const Score score(p);

  Keys seen[2] = {}, seen_by_all{0, 0};  // by this lane's queries, by every one of the warpgroup
  float log2_sum[2] = {INFINITY, INFINITY}, delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = warp_query + 8 * half + lane / 4;
    if (query < work.queries.begin || query >= work.queries.end) continue;
    const int64_t at = (work.batch * p.heads + work.head) * p.queries + query;
    seen[half] = work.visible.keys(query);
    log2_sum[half] = terms.log2_sum[at];
    delta[half] = terms.delta[at];
  }
  if (group_query >= work.queries.begin && group_query + 64 <= work.queries.end) {
    seen_by_all = {work.visible.keys(group_query + 63).begin, work.visible.keys(group_query).end};
  }

  const uint64_t q = moved(along(shared.q), group * 64 * kPanelBytes);
  const uint64_t grad_out = moved(q, RowTile::kBytes);
  const uint64_t tiles = moved(along(shared.q), 2 * RowTile::kBytes);
  float dq[1][kHeadDim / 8][4] = {};
  float s[kKeys / 8][4], ds[kKeys / 8][4];
  uint32_t slopes[kKeys / 16][4];
  int step = 0, first = work.keys.begin;

  const auto wait_tile = [&](int i) { wait_barrier(&shared.full[i % kStages], i / kStages % 2); };
  // inside: every query of the warpgroup sees all keys of the tile.
  const auto next = [&](auto inside) {
    constexpr bool kInside = decltype(inside)::value;
    const int stage = step % kStages;
    const uint64_t k = moved(tiles, stage * 2 * KeyTile::kBytes), v = moved(k, KeyTile::kBytes);
    if (!kInside && first + kKeys > work.keys.end) {
      const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
      shared.keys[stage].k.clear(work.keys.end - first, kKeys, thread, kConsumerThreads);
      publish_stores();
      bar_sync(1, kConsumerThreads);
    }
    begin_transposed<T, RowTile, KeyTile, kHeadDim>(s, q, k);
    begin_transposed<T, RowTile, KeyTile, kHeadDim>(ds, grad_out, v);
    wait_products<1>(s);
    if (step > 0 && lane == 0) arrive(&shared.empty[(step - 1) % kStages]);
    if (!kSoftcap) {
#pragma unroll
      for (int e = 0; e < kKeys / 2; ++e) {
        float& x = s[e / 4][e % 4];
        x = exp2_approx(fmaf(x, score.inner, -log2_sum[e / 2 % 2]));
      }
    }
    // ptxas moves waits for products up to the last branch: this one keeps the weights before.
    if (step + 1 < work.steps) wait_tile(step + 1);
    wait_products<0>(ds);
#pragma unroll
    for (int e = 0; e < kKeys / 2; ++e) {
      const int half = e / 2 % 2, key = first + e / 4 * 8 + lane % 4 * 2 + e % 2;
      float &x = s[e / 4][e % 4], &dx = ds[e / 4][e % 4];
      if (kSoftcap) {
        weigh<true>(score, x, dx, log2_sum[half], delta[half]);
      } else {
        dx = x * (dx - delta[half]);
      }
      if (!kInside && (key < seen[half].begin || key >= seen[half].end)) dx = 0.0f;
    }
    round_to_left<T>(ds, slopes);
    begin_sum<T>(dq[0], slopes, across<KeyTile>(k));
    ++step;
    first += kKeys;
  };
  const auto is_inside = [&] {
    return first >= seen_by_all.begin && first + kKeys <= seen_by_all.end;
  };
  if (work.steps > 0) {
    wait_barrier(&shared.rows_full, 0);
    wait_tile(0);
  }
  while (step < work.steps) {
    while (step < work.steps && !is_inside()) next(std::false_type());
    wait_products<0, 0>(dq[0]);
    while (step < work.steps && is_inside()) next(std::true_type());
    wait_products<0, 1>(dq[0]);
  }

  bar_sync(1, kConsumerThreads);  // no warp needs q or dOut: dQ takes their place
  static_assert(kConsumerThreads / 2 * kTileStride<kHeadDim> * sizeof(T) <= 2 * RowTile::kBytes);
  T* const tile =
      reinterpret_cast<T*>(shared.q.bytes) + (4 * group + warp) * 16 * kTileStride<kHeadDim>;
  const auto scale = static_cast<float>(p.scale);
  const float factors[1][2] = {{scale, scale}};
  write_rows<kHeadDim>(tile, dq, factors, static_cast<int>(p.head_dim), packed, [&](int r) {
    const int query = warp_query + r;
    return query < p.queries ? row_of<T>(g.grad_q, work.batch, work.head, query) : nullptr;
  });
}

template <typename T, int kHeadDim, bool kSoftcap>
__global__ void __launch_bounds__(Size<kHeadDim>::kThreads, 1)
    grad_queries_sm90_kernel(const __grid_constant__ AttentionBackwardParams g,
                             const __grid_constant__ GradMaps maps, RowTerms terms, bool packed) {
  using Size = Size<kHeadDim>;
  Shared<kHeadDim>& shared = shared_as<Shared<kHeadDim>>();
  const Work work(g.forward, Size::kRows);
  if (threadIdx.x == 0) shared.init_barriers();
  sync_threads();
  // Of the block; the shuffle shows the compiler that lanes agree.
  const int group = shfl(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == 0) {
    shrink_registers<Size::kProducerRegisters>();
    if (threadIdx.x == 0 && work.steps > 0) copy_tiles(shared, work, maps);
  } else {
    grow_registers<Size::kConsumerRegisters>();
    consume<T, kHeadDim, kSoftcap>(shared, work, g, terms, group - 1, packed);
  }
}

LONGROPE_MAX_REGISTERS(grad_queries_sm90_kernel, 168)

}  // namespace
}  // namespace sm90

void grad_queries_sm90(const AttentionBackwardParams& g, const RowTerms& terms,
                       cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  sm90::for_kernel(p, [&](auto type, auto size, auto softcap) {
    using Size = sm90::Size<size.value>;
    using Shared = sm90::Shared<size.value>;
    const int64_t tiles = ceil_div<int64_t>(p.queries, Size::kRows) * p.heads * p.batch;
    launch("attention_backward_sm90",
           sm90::grad_queries_sm90_kernel<decltype(type), size.value, softcap.value>, tiles,
           Size::kThreads, sm90::kBytesOf<Shared>, stream, g,
           sm90::GradMaps(g, Size::kRows, sm90::kKeys), terms, is_packed(g.grad_q, p));
  });
}

}  // namespace cuda
}  // namespace longrope
