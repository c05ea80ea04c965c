// The sizes of the forward pass on compute capability 9.0, its shared memory and what a block does.
#pragma once

#include "attention/cuda/sm90/panels.cuh"
#include "attention/cuda/sm90/query_block.cuh"

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

// What a block does.
template <int kHeadDim>
struct ForwardWork : QueryBlock {
  static constexpr int kKeys = ForwardTile<kHeadDim>::kKeys;

  int steps;       // tiles of keys
  int last_query;  // of all

  __device__ __forceinline__ explicit ForwardWork(const AttentionParams& p)
      : QueryBlock(p, ForwardTile<kHeadDim>::kRows),
        steps(tiles(kKeys)),
        last_query(static_cast<int>(p.queries) - 1) {}

  __device__ __forceinline__ int first_key(int step) const { return keys.end - (step + 1) * kKeys; }
  __device__ __forceinline__ Keys keys_of(int query) const {
    return visible.keys(query < last_query ? query : last_query);
  }
};

}  // namespace longrope::cuda::sm90
