// Split over the keys: where there are few rows, several blocks share a tile of rows, each with a
// part of the keys, and a second kernel joins their results in the order of the keys.
#pragma once

#include "attention/cuda/visible.cuh"

namespace longrope::cuda {

// Results of the parts, normalised as if no other keys existed. count 1: no parts.
struct Splits {
  int count;
  float* out;  // [count, batch, heads, queries, head_dim]
  float* lse;  // [count, batch, heads, queries]
};

// The work of one block: rows from first_row on against the keys. Blocks run with the tiles of a
// head fastest, so that those at work at one time share keys in the cache, and the last tile, which
// sees the most keys, first.
struct Assignment {
  Head head;
  int first_row, split;
  bool is_idle;  // no query of these rows attends
  Keys keys;

  __device__ __forceinline__ Assignment(const AttentionParams& p, int rows, int keys_at_once,
                                        int splits)
      : Assignment(
            p, rows, keys_at_once, static_cast<unsigned>(splits),
            static_cast<unsigned>(ceil_div<int64_t>(p.queries * (p.heads / p.kv_heads), rows))) {}

 private:
  __device__ __forceinline__ Assignment(const AttentionParams& p, int rows, int keys_at_once,
                                        unsigned splits, unsigned tiles)
      : head(p, blockIdx.x / tiles / splits),
        first_row(static_cast<int>(tiles - 1 - blockIdx.x % tiles) * rows),
        split(static_cast<int>(blockIdx.x / tiles % splits)) {
    const Keys all = head.attending(p);
    const int row = first_row > all.begin ? first_row : all.begin;
    const int last = (first_row + rows < all.end ? first_row + rows : all.end) - 1;
    is_idle = row > last;
    keys = is_idle ? Keys{0, 0} : head.visible.keys(head.query(row), head.query(last));
    if (keys.begin >= keys.end || splits == 1) return;
    const int64_t steps = ceil_div(keys.end - keys.begin, keys_at_once);
    const auto from = static_cast<int>(steps * split / splits);
    const auto to = static_cast<int>(steps * (split + 1) / splits);
    const int end = keys.begin + to * keys_at_once;
    keys = {keys.begin + from * keys_at_once, end < keys.end ? end : keys.end};
  }
};

inline int64_t row_tiles(const AttentionParams& p, int rows) {
  return ceil_div<int64_t>(p.queries * (p.heads / p.kv_heads), rows) * p.kv_heads * p.batch;
}

constexpr int kMaxSplits = 264;

// As many parts as make two blocks for every multiprocessor of a large GPU (132 on H100 and H200),
// but none of less than two steps. The number depends on the shapes alone, not on the device: how
// sums are cut is no reason for devices to differ.
inline int split_count(const AttentionParams& p, int rows, int keys_at_once) {
  const int64_t window = std::min(p.window, p.keys);
  const int64_t seen = p.causal && window ? std::min(p.keys, p.queries + window) : p.keys;
  const int64_t steps = ceil_div<int64_t>(seen, keys_at_once);
  return static_cast<int>(
      std::max<int64_t>(1, std::min(kMaxSplits / row_tiles(p, rows), steps / 2)));
}

}  // namespace longrope::cuda
