// The sizes of the forward pass on compute capability 9.0, its shared memory and what a block does.
#pragma once

#include "attention/cuda/sm90/panels.cuh"
#include "attention/cuda/visible.cuh"

namespace longrope::cuda::sm90 {

template <int kHeadDim>
struct ForwardTile {
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;  // warpgroups
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = kHeadDim == 256 ? 64 : 128;
  static constexpr int kStages = kHeadDim == 64 ? 3 : 2;  // of keys, and of values
  // At entry every thread has 168 registers (128 where there are 512 threads), then consumers take
  // what the copying warpgroup gives up: for more than that they would wait without end. Sums of O
  // and S and the weights are 128, 160 and 176 of theirs.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (kConsumers + 1) * registers_at_entry(kThreads));
  // Whether the softmax of a warpgroup waits for its turn. At head_dim 256 the products are long
  // and O and S leave no registers to spare.
  static constexpr bool kTakesTurns = kHeadDim <= 128;
};

template <int kHeadDim>
struct ForwardShared {
  using Size = ForwardTile<kHeadDim>;
  using QueryTile = Panels<kHeadDim, Size::kRows>;
  using KeyTile = Panels<kHeadDim, Size::kKeys>;

  QueryTile q;
  KeyTile k[Size::kStages], v[Size::kStages];
  uint64_t q_full, edge_full;
  uint64_t k_full[Size::kStages], k_empty[Size::kStages];
  uint64_t v_full[Size::kStages], v_empty[Size::kStages];

  __device__ __forceinline__ void init_barriers() {
    init_barrier(&q_full, 1);
    init_barrier(&edge_full, 1);
    for (int i = 0; i < Size::kStages; ++i) {
      init_barrier(&k_full[i], 1);
      init_barrier(&v_full[i], 1);
      init_barrier(&k_empty[i], Size::kConsumers);
      init_barrier(&v_empty[i], Size::kConsumers);
    }
    publish_barriers();
  }
};

// A place in a ring of tiles and the parity of the phase in which it is filled there.
template <int kStages>
struct Place {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0 ? 1 : 0;
  }
};

// What a block does. Blocks run with the tiles of a head fastest, so that those at work at one time
// share keys in the cache, and the last tile, which sees the most keys, first.
template <int kHeadDim>
struct ForwardWork {
  static constexpr int kRows = ForwardTile<kHeadDim>::kRows, kKeys = ForwardTile<kHeadDim>::kKeys;

  int batch, head, first_query, last_query;  // the last one of all
  Visible visible;
  Keys queries;  // of them those that attend, of all heads
  Keys keys;     // that these see
  int steps;     // tiles of them

  __device__ __forceinline__ explicit ForwardWork(const AttentionParams& p)
      : ForwardWork(p, static_cast<unsigned>(ceil_div<int64_t>(p.queries, kRows)),
                    static_cast<unsigned>(p.heads)) {}

  __device__ __forceinline__ ForwardWork(const AttentionParams& p, unsigned tiles, unsigned heads)
      : batch(static_cast<int>(blockIdx.x / tiles / heads)),
        head(static_cast<int>(blockIdx.x / tiles % heads)),
        first_query(static_cast<int>(tiles - 1 - blockIdx.x % tiles) * kRows),
        last_query(static_cast<int>(p.queries) - 1),
        visible(p, batch),
        queries(attending(p, batch)) {
    const int first = first_query > queries.begin ? first_query : queries.begin;
    const int end = first_query + kRows < queries.end ? first_query + kRows : queries.end;
    keys = first < end ? visible.keys(first, end - 1) : Keys{0, 0};
    steps = keys.begin < keys.end ? ceil_div(keys.end - keys.begin, kKeys) : 0;
  }

  __device__ __forceinline__ bool is_idle() const {
    return first_query >= queries.end || first_query + kRows <= queries.begin;
  }
  __device__ __forceinline__ int first_key(int step) const { return keys.end - (step + 1) * kKeys; }
  __device__ __forceinline__ Keys keys_of(int query) const {
    return visible.keys(query < last_query ? query : last_query);
  }
};

}  // namespace longrope::cuda::sm90
