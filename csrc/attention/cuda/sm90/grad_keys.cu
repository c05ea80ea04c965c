// Gradients of keys and values of 16-bit elements on compute capability 9.0 (wgmma, bulk copies of
// tensor tiles).
//
// Formula and accumulation: those of ../grad_keys.cu, transposed as there.
// Mapping: a block takes 128 keys of one key/value head, 64 to each of its two consumer warpgroups,
// and walks through the queries that see them, 64 of one head at a time and head after head of
// those that share the keys: their sum is taken in this order, so results are the same on every
// run. A third warpgroup copies: one thread the tiles (keys and values once, q and dOut into a
// ring) and 64 threads the log-sum-exp and delta of a row each. For every tile of rows a consumer
// does
//
//   begin S^T = K Q^T    wait for dV and dK of the tile before, free it    begin dP^T = V dOut^T
//   wait for both    P, dS, rounded in registers    begin dV += P^T dOut    begin dK += dS^T Q
//
// so that products of one warpgroup run while the other weighs, and its own S^T beside the sums of
// the tile before. Tiles begin at the first query that sees one of the keys. Behind the last one
// rows may hold anything: they are made zeros (0 times NaN is NaN), and get the terms of a row
// whose weights are 0. What keys hold that nobody sees stays in their own rows, which are masked.
// Bytes moved: k, v and their gradients once, q and dOut once for every 128 keys that they see
// (half of them where causal), most of it from the second-level cache.
#include "attention/cuda/sm90/grads.cuh"

namespace longrope {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerThreads = kWarpgroup * kConsumers;
constexpr int kThreads = kWarpgroup + kConsumerThreads;
constexpr int kKeys = 64 * kConsumers;
constexpr int kRows = 64;  // of a tile
constexpr int kStages =
    4;  // of 64 rows of q and dOut: with keys and values 194 KiB at head_dim 128
// Consumers take what the copying warpgroup gives up. The sums of dK, dV, S and dP are 192 of
// theirs.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              (kConsumers + 1) * registers_at_entry(kThreads));

template <int kHeadDim>
struct Shared {
  using KeyTile = Panels<kHeadDim, kKeys>;
  using RowTile = Panels<kHeadDim, kRows>;
  struct Rows {
    RowTile q, grad_out;
  };
  struct alignas(8) Terms {
    float log2_sum[kRows], delta[kRows];
  };

  KeyTile k, v;
  Rows rows[kStages];
  Terms terms[kStages];
  uint64_t keys_full, full[kStages], empty[kStages];

  __device__ __forceinline__ void init_barriers() {
    init_barrier(&keys_full, 1);
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&full[i], 1 + kRows);  // the thread that copies, and those that write the terms
      init_barrier(&empty[i], kConsumerThreads / 32);  // a lane of every warp
    }
    publish_barriers();
  }
};

// What a block does. Blocks run with the tiles of a head fastest, so that those at work at one time
// share queries in the cache, and the first tile, which most queries see where causal, first.
struct Work {
  Head head;
  int first_key;
  Keys queries;  // that see one of the keys, of every head
  int steps;     // tiles of them, of all heads

  __device__ __forceinline__ explicit Work(const AttentionParams& p)
      : Work(p, static_cast<unsigned>(ceil_div<int64_t>(p.keys, kKeys))) {}

  __device__ __forceinline__ Work(const AttentionParams& p, unsigned tiles)
      : head(p, blockIdx.x / tiles),
        first_key(static_cast<int>(blockIdx.x % tiles) * kKeys),
        queries(head.visible.queries(first_key, first_key + kKeys, attending(p, head.batch))) {
    const int count = queries.end - queries.begin;
    steps = count > 0 ? ceil_div(count, kRows) * head.group : 0;
  }
};

// One thread copies.
template <int kHeadDim>
__device__ __forceinline__ void copy_tiles(Shared<kHeadDim>& shared, const Work& work,
                                           const GradMaps& maps) {
  using Shared = Shared<kHeadDim>;
  const Head& head = work.head;
  const int batch = static_cast<int>(head.batch);
  arrive_expecting(&shared.keys_full, 2 * Shared::KeyTile::kBytes);
  shared.k.copy(maps.k, &shared.keys_full, work.first_key, head.kv_head, batch);
  shared.v.copy(maps.v, &shared.keys_full, work.first_key, head.kv_head, batch);
  int query = work.queries.begin, member = head.kv_head * head.group;
#pragma unroll 1
  for (int step = 0; step < work.steps; ++step) {
    const int stage = step % kStages;
    uint64_t* const full = &shared.full[stage];
    wait_barrier(&shared.empty[stage], step / kStages % 2 ^ 1);
    arrive_expecting(full, 2 * Shared::RowTile::kBytes);
    shared.rows[stage].q.copy(maps.q, full, query, member, batch);
    shared.rows[stage].grad_out.copy(maps.grad_out, full, query, member, batch);
    query += kRows;
    if (query >= work.queries.end) query = work.queries.begin, ++member;
  }
}

// One of kRows threads writes the terms of row `row` of every tile.
template <int kHeadDim>
__device__ __forceinline__ void write_terms(Shared<kHeadDim>& shared, const Work& work,
                                            const AttentionParams& p, const RowTerms& terms,
                                            int row) {
  const Head& head = work.head;
  int64_t at = (head.batch * p.heads + head.kv_head * head.group) * p.queries;  // of the head
  int query = work.queries.begin + row;
#pragma unroll 1
  for (int step = 0; step < work.steps; ++step) {
    const int stage = step % kStages;
    const bool exists = query < work.queries.end;
    const float log2_sum = exists ? terms.log2_sum[at + query] : INFINITY;
    const float delta = exists ? terms.delta[at + query] : 0.0f;
    wait_barrier(&shared.empty[stage], step / kStages % 2 ^ 1);
    shared.terms[stage].log2_sum[row] = log2_sum;
    shared.terms[stage].delta[row] = delta;
    arrive(&shared.full[stage]);
    query += kRows;
    if (query - row >= work.queries.end) query = work.queries.begin + row, at += p.queries;
  }
}

template <typename T, int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void consume(Shared<kHeadDim>& shared, const Work& work,
                                        const AttentionBackwardParams& g, int group, bool packed) {
  using KeyTile = typename Shared<kHeadDim>::KeyTile;
  using RowTile = typename Shared<kHeadDim>::RowTile;
  const AttentionParams& p = g.forward;
  const Head& head = work.head;
  const int queries = work.queries.end - work.queries.begin;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  const int group_key = work.first_key + 64 * group, key = group_key + 16 * warp + lane / 4;
  const Score score(p);

  // From here on queries count from the first one. Those that see each of this lane's keys, less
  // the first one of a tile that is this lane's, and those that see all keys of the warpgroup.
  const auto seeing = [&](int x) {
    const Keys all = head.visible.queries(x, x + 1, work.queries);
    return Keys{all.begin - work.queries.begin, all.end - work.queries.begin};
  };
  Keys by[2], by_all{0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Keys all = seeing(key + 8 * half);
    by[half] = {all.begin - lane % 4 * 2, all.end - lane % 4 * 2};
  }
  if (group_key >= head.visible.first && group_key + 64 <= head.visible.limit) {
    by_all = {seeing(group_key + 63).begin, seeing(group_key).end};
  }

  const uint64_t k = moved(along(shared.k), group * 64 * kPanelBytes);
  const uint64_t v = moved(k, KeyTile::kBytes);
  const uint64_t tiles = moved(along(shared.k), 2 * KeyTile::kBytes);
  float dk[1][kHeadDim / 8][4] = {}, dv[1][kHeadDim / 8][4] = {};
  float s[kRows / 8][4], ds[kRows / 8][4];
  uint32_t weights[kRows / 16][4], slopes[kRows / 16][4];
  int step = 0, first = 0;

  // inside: every query of the tile sees all keys of the warpgroup.
  const auto next = [&](auto inside) {
    constexpr bool kInside = decltype(inside)::value;
    const int stage = step % kStages;
    const uint64_t q = moved(tiles, stage * 2 * RowTile::kBytes);
    const uint64_t grad_out = moved(q, RowTile::kBytes);
    wait_barrier(&shared.full[stage], step / kStages % 2);
    if (!kInside && first + kRows > queries) {
      const int thread = static_cast<int>(threadIdx.x) - kWarpgroup, row = queries - first;
      shared.rows[stage].q.clear(row, kRows, thread, kConsumerThreads);
      shared.rows[stage].grad_out.clear(row, kRows, thread, kConsumerThreads);
      publish_stores();
      bar_sync(1, kConsumerThreads);
    }
    begin_transposed<T, KeyTile, RowTile, kHeadDim>(s, k, q);
    wait_products<1>(dk[0]);
    if (step > 0 && lane == 0) arrive(&shared.empty[(step - 1) % kStages]);
    begin_transposed<T, KeyTile, RowTile, kHeadDim>(ds, v, grad_out);
    wait_products<0>(s);
    wait_products<0>(ds);
    const auto& terms = shared.terms[stage];
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const int row = 8 * j + lane % 4 * 2;
      const auto log2_sum = load<2>(terms.log2_sum + row), delta = load<2>(terms.delta + row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float *const x = s[j] + 2 * half, *const dx = ds[j] + 2 * half;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weigh<kSoftcap>(score, x[e], dx[e], log2_sum.values[e], delta.values[e]);
          const int query = first + 8 * j + e;
          if (!kInside && (query < by[half].begin || query >= by[half].end)) x[e] = dx[e] = 0.0f;
        }
        weights[j / 2][j % 2 * 2 + half] = pack_pair<T>(x[0], x[1]);
        slopes[j / 2][j % 2 * 2 + half] = pack_pair<T>(dx[0], dx[1]);
      }
    }
    begin_sum<T>(dv[0], weights, across<RowTile>(grad_out));
    begin_sum<T>(dk[0], slopes, across<RowTile>(q));
    ++step;
    first += kRows;
    if (first >= queries) first = 0;
  };
  const auto is_inside = [&] { return first >= by_all.begin && first + kRows <= by_all.end; };
  if (work.steps > 0) wait_barrier(&shared.keys_full, 0);
  while (step < work.steps) {
    while (step < work.steps && !is_inside()) next(std::false_type());
    wait_products<0, 0>(dk[0]);
    while (step < work.steps && is_inside()) next(std::true_type());
    wait_products<0, 1>(dk[0]);
  }
  wait_products<0, 2>(dv[0]);

  bar_sync(1, kConsumerThreads);  // no warp needs keys or values: gradients take their place
  static_assert(kConsumerThreads / 2 * kTileStride<kHeadDim> * sizeof(T) <= 2 * KeyTile::kBytes);
  T* const tile =
      reinterpret_cast<T*>(shared.k.bytes) + (4 * group + warp) * 16 * kTileStride<kHeadDim>;
  const auto write = [&](const auto& grad, const AttentionTensor& x, float factor) {
    const float factors[1][2] = {{factor, factor}};
    write_rows<kHeadDim>(tile, grad, factors, static_cast<int>(p.head_dim), packed, [&](int r) {
      const int at = group_key + 16 * warp + r;
      return at < p.keys ? head.key<T>(x, at) : nullptr;
    });
  };
  write(dk, g.grad_k, static_cast<float>(p.scale));
  sync_warp();
  write(dv, g.grad_v, 1.0f);
}

template <typename T, int kHeadDim, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1)
    grad_keys_sm90_kernel(const __grid_constant__ AttentionBackwardParams g,
                          const __grid_constant__ GradMaps maps, RowTerms terms, bool packed) {
  Shared<kHeadDim>& shared = shared_as<Shared<kHeadDim>>();
  const Work work(g.forward);
  if (threadIdx.x == 0) shared.init_barriers();
  sync_threads();
  // Of the block; the shuffle shows the compiler that lanes agree.
  const int group = shfl(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == 0) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0 && work.steps > 0) copy_tiles(shared, work, maps);
    if (threadIdx.x >= kRows) {
      write_terms(shared, work, g.forward, terms, static_cast<int>(threadIdx.x) - kRows);
    }
  } else {
    grow_registers<kConsumerRegisters>();
    consume<T, kHeadDim, kSoftcap>(shared, work, g, group - 1, packed);
  }
}

LONGROPE_MAX_REGISTERS(grad_keys_sm90_kernel, 168)

}  // namespace
}  // namespace sm90

void grad_keys_sm90(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  const int64_t tiles = ceil_div<int64_t>(p.keys, sm90::kKeys) * p.kv_heads * p.batch;
  sm90::for_kernel(p, [&](auto type, auto size, auto softcap) {
    using Shared = sm90::Shared<size.value>;
    launch("attention_backward_sm90",
           sm90::grad_keys_sm90_kernel<decltype(type), size.value, softcap.value>, tiles,
           sm90::kThreads, sm90::kBytesOf<Shared>, stream, g,
           sm90::GradMaps(g, sm90::kRows, sm90::kKeys), terms,
           is_packed(g.grad_k, p) && is_packed(g.grad_v, p));
  });
}

}  // namespace cuda
}  // namespace longrope
