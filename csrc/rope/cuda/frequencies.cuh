// The frequencies of one row of the batch, net of `turn` and `undo`, in shared memory.
#pragma once

#include "common/cuda/rotation.cuh"
#include "rope/rows.h"

namespace longrope::cuda {

// Sets of net frequencies: positions below the start tokens of `turn` add 1 to the index of their
// set, those below the start tokens of `undo` add 2.
inline int frequency_sets(const RopeParams& p) {
  return p.undo.base_inv_freq ? 4 : p.turn.base_inv_freq ? 2 : 1;
}

inline size_t frequency_bytes(const RopeParams& p) {
  return static_cast<size_t>(frequency_sets(p)) * p.pairs * (sizeof(uint64_t) + sizeof(float));
}

struct RowFrequencies {
  uint64_t* turns;                 // [sets, pairs]
  float* valid;                    // [sets, pairs], see Frequency
  int64_t turn_start, undo_start;  // tokens

  // Takes frequency_bytes() at `memory`.
  __device__ __forceinline__ RowFrequencies(const RopeParams& p, int64_t row, RowTiers tiers,
                                            int sets, unsigned char* memory)
      : turns(reinterpret_cast<uint64_t*>(memory)),
        valid(reinterpret_cast<float*>(turns + sets * p.pairs)),
        turn_start(start_tokens_of(p.turn, row, tiers.turn)),
        undo_start(start_tokens_of(p.undo, row, tiers.undo)) {}

  // Fills them with all threads of the block, and waits for all.
  __device__ __forceinline__ void fill(const RopeParams& p, int64_t row, RowTiers tiers, int sets) {
    const int pairs = static_cast<int>(p.pairs);
    for (int i = threadIdx.x; i < sets * pairs; i += blockDim.x) {
      const int set = i / pairs, pair = i % pairs;
      uint64_t total = 0;
      float both = 1.0f;
      if (p.turn.inv_freq) {
        const Frequency f = frequency(p.turn, row, tiers.turn, set & 1, pairs, pair);
        total += f.turns;
        both *= f.valid;
      }
      if (p.undo.inv_freq) {
        const Frequency f = frequency(p.undo, row, tiers.undo, set & 2, pairs, pair);
        total -= f.turns;
        both *= f.valid;
      }
      turns[i] = total;
      valid[i] = both;
    }
    sync_threads();
  }

  // cos and sin of kCount neighbouring pairs from `pair` on, times `factor`.
  template <int kCount>
  __device__ __forceinline__ void turn(const RopeParams& p, int64_t position, int pair,
                                       float factor, float (&cos)[kCount],
                                       float (&sin)[kCount]) const {
    const int set =
        (is_below(turn_start, position) ? 1 : 0) + (is_below(undo_start, position) ? 2 : 0);
    const int at = set * static_cast<int>(p.pairs) + pair;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      cos_sin(static_cast<uint64_t>(position) * turns[at + j], cos[j], sin[j]);
      cos[j] *= factor * valid[at + j];
      sin[j] *= factor * valid[at + j];
    }
  }

 private:
  static __device__ __forceinline__ Frequency frequency(const RopeFrequencies& f, int64_t row,
                                                        int64_t tier, bool below, int pairs,
                                                        int pair) {
    if (tier < 0) return {0, 1.0f};
    if (!has_tier(f, tier)) return frequency_of(NAN);
    return frequency_of(frequencies_of(f, row, tier, below && f.base_inv_freq, pairs)[pair]);
  }
};

// A unit is kCount pairs: two packs of kCount elements, at these offsets from the row's start.
template <int kCount>
__device__ __forceinline__ int first_of(const RopeParams& p, int unit) {
  return p.interleaved ? 2 * kCount * unit : kCount * unit;
}

template <int kCount>
__device__ __forceinline__ int second_of(const RopeParams& p, int unit) {
  return p.interleaved ? 2 * kCount * unit + kCount : static_cast<int>(p.pairs) + kCount * unit;
}

// True where rows of `t` can be read as packs of `count` elements.
inline bool packs(const RopeTensor& t, int64_t count, int64_t element_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(t.data);
  return t.heads == 0 || (address % (count * element_bytes) == 0 && t.batch_stride % count == 0 &&
                          t.head_stride % count == 0 && t.token_stride % count == 0);
}

}  // namespace longrope::cuda
