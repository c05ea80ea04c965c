// Which rows a block takes and which keys they see; forward and backward kernels share it.
//
// The queries of all heads that share a key/value head are its rows: row r is query r / group of
// head kv_head * group + r % group, so that a tile of keys is read once for the whole group.
#pragma once

#include <algorithm>

#include "attention/cuda/views.cuh"

namespace longrope::cuda {

constexpr int64_t kMaxPosition = int64_t{1} << 29;  // of keys and rows: sums of three fit an int

struct Keys {
  int begin, end;  // empty where begin >= end
};

__device__ __forceinline__ int64_t at(const AttentionBound& bound, int64_t batch) {
  return bound.rows ? bound.rows[batch] : bound.all;
}
__device__ __forceinline__ int64_t clamp(int64_t x, int64_t most) {
  return x > most ? most : x < -most ? -most : x;
}
__device__ __forceinline__ int64_t within(int64_t x, int64_t most) {
  return x < 0 ? 0 : x > most ? most : x;
}

// The queries of a row of the batch that attend.
__device__ __forceinline__ Keys attending(const AttentionParams& p, int64_t batch) {
  return {static_cast<int>(within(at(p.query_begin, batch), p.queries)),
          static_cast<int>(within(at(p.query_end, batch), p.queries))};
}

// Of one row of the batch, for queries that attend. What a query sees begins and ends no earlier
// than what the one before it sees, and without gaps between them.
struct Visible {
  int first, limit;  // keys that exist
  int low, high;     // query i sees [i + low, i + high) of them

  __device__ __forceinline__ Visible(const AttentionParams& p, int64_t batch) {
    const int64_t start = clamp(at(p.query_start, batch), int64_t{1} << 62);
    const int64_t window = clamp(p.window, int64_t{1} << 62);
    first = static_cast<int>(within(at(p.key_start, batch), p.keys));
    limit = static_cast<int>(within(at(p.key_length, batch), p.keys));
    low = static_cast<int>(clamp(window ? start - window + 1 : -kMaxPosition, kMaxPosition));
    high = static_cast<int>(clamp(p.causal ? start + 1 : kMaxPosition, kMaxPosition));
  }

  // Of queries [begin, last].
  __device__ __forceinline__ Keys keys(int begin, int last) const {
    return {first > begin + low ? first : begin + low, limit < last + high ? limit : last + high};
  }
  __device__ __forceinline__ Keys keys(int query) const { return keys(query, query); }

  // Those among the queries `all` that see one of the keys [begin, end).
  __device__ __forceinline__ Keys queries(int begin, int end, Keys all) const {
    begin = begin > first ? begin : first;
    end = end < limit ? end : limit;
    if (begin >= end) return {0, 0};
    const int from = begin - high + 1, to = end - low;
    return {from > all.begin ? from : all.begin, to < all.end ? to : all.end};
  }
};

// The query and the member of a row, from row to row in steps of `count` with one division at the
// beginning.
struct RowSteps {
  const int group;
  int query, member;           // of the row
  const int queries, members;  // of a step

  __device__ __forceinline__ RowSteps(int group, int row, int count)
      : group(group),
        query(row / group),
        member(row % group),
        queries(count / group),
        members(count % group) {}

  // Whether the step goes to one more query than `queries`.
  __device__ __forceinline__ bool step() {
    query += queries;
    member += members;
    const bool wraps = member >= group;
    query += wraps ? 1 : 0;
    member -= wraps ? group : 0;
    return wraps;
  }
};

// One key/value head of one row of the batch.
struct Head {
  int64_t batch;
  int kv_head, group, rows, last_query;
  Visible visible;

  __device__ __forceinline__ Head(const AttentionParams& p, unsigned index)
      : batch(index / static_cast<unsigned>(p.kv_heads)),
        kv_head(static_cast<int>(index % static_cast<unsigned>(p.kv_heads))),
        group(static_cast<int>(p.heads / p.kv_heads)),
        rows(static_cast<int>(p.queries) * group),
        last_query(static_cast<int>(p.queries) - 1),
        visible(p, batch) {}

  // The query of row r; rows beyond the last count as the last.
  __device__ __forceinline__ int query(int r) const {
    const int query = r / group;
    return query < last_query ? query : last_query;
  }
  // The rows whose queries attend.
  __device__ __forceinline__ Keys attending(const AttentionParams& p) const {
    const Keys queries = cuda::attending(p, batch);
    return {queries.begin * group, queries.end * group};
  }
  // Keys that rows [begin, begin + count), which attend, see among them.
  __device__ __forceinline__ Keys keys(int begin, int count) const {
    return visible.keys(query(begin), query(begin + count - 1));
  }

  template <typename T>
  __device__ __forceinline__ T* row(const AttentionTensor& x, int r) const {
    return row_of<T>(x, batch, kv_head * group + r % group, r / group);
  }
  template <typename T>
  __device__ __forceinline__ T* key(const AttentionTensor& x, int key) const {
    return row_of<T>(x, batch, kv_head, key);
  }
  // Where the row stands in [batch, heads, queries].
  __device__ __forceinline__ int64_t flat(const AttentionParams& p, int r) const {
    return flat(p, RowSteps(group, r, 1));
  }
  __device__ __forceinline__ int64_t flat(const AttentionParams& p, const RowSteps& at) const {
    return (batch * p.heads + kv_head * group + at.member) * p.queries + at.query;
  }
};

}  // namespace longrope::cuda
