// The queries of one head that a block takes on compute capability 9.0.
#pragma once

#include "attention/cuda/visible.cuh"

namespace longrope::cuda::sm90 {

// Blocks run with the tiles of a head fastest, so that those at work at one time share keys in the
// cache, and the last tile, which sees the most keys, first.
struct QueryBlock {
  int batch, head, kv_head, first_query;
  Visible visible;
  Keys queries;  // of the block those that attend
  Keys keys;     // that these see

  // With `rows` queries.
  __device__ __forceinline__ QueryBlock(const AttentionParams& p, int rows)
      : QueryBlock(p, rows, static_cast<unsigned>(ceil_div<int64_t>(p.queries, rows)),
                   static_cast<unsigned>(p.heads)) {}

  __device__ __forceinline__ bool is_idle() const { return queries.begin >= queries.end; }
  // Tiles of the keys.
  __device__ __forceinline__ int tiles(int keys_at_once) const {
    return keys.begin < keys.end ? ceil_div(keys.end - keys.begin, keys_at_once) : 0;
  }

 private:
  __device__ __forceinline__ QueryBlock(const AttentionParams& p, int rows, unsigned tiles,
                                        unsigned heads)
      : batch(static_cast<int>(blockIdx.x / tiles / heads)),
        head(static_cast<int>(blockIdx.x / tiles % heads)),
        kv_head(head / static_cast<int>(p.heads / p.kv_heads)),
        first_query(static_cast<int>(tiles - 1 - blockIdx.x % tiles) * rows),
        visible(p, batch),
        queries(attending(p, batch)) {
    if (queries.begin < first_query) queries.begin = first_query;
    if (queries.end > first_query + rows) queries.end = first_query + rows;
    keys = is_idle() ? Keys{0, 0} : visible.keys(queries.begin, queries.end - 1);
  }
};

}  // namespace longrope::cuda::sm90
