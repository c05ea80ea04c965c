// Which queries of a row of the batch attend, and which keys they see.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace longrope {

// Indices [begin, end); empty when end <= begin.
struct Range {
  int64_t begin, end;
};

inline Range common_part(Range a, Range b) {
  return Range{a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// The queries of row b of the batch that attend.
inline Range attending(const AttentionParams& p, int64_t b) {
  return common_part(Range{p.query_begin[b], p.query_end[b]}, Range{0, p.queries});
}

// The keys that query `query` of row b of the batch sees.
inline Range visible(const AttentionParams& p, int64_t b, int64_t query) {
  // Far enough out to see all or nothing, and no sum below overflows.
  constexpr int64_t kFar = int64_t{1} << 60;
  if (query < p.query_begin[b] || query >= p.query_end[b]) return Range{0, 0};
  int64_t position = p.query_start[b];
  position = position > kFar ? kFar : position < -kFar ? -kFar : position;
  position += query;
  Range keys{p.key_start[b], p.key_length[b]};
  if (p.causal && position + 1 < keys.end) keys.end = position + 1;
  if (p.window > 0) {
    const int64_t oldest = position + 1 - (p.window < kFar ? p.window : kFar);
    if (oldest > keys.begin) keys.begin = oldest;
  }
  return keys;
}

// The keys that any of the queries sees, which all attend. What consecutive ones see touches, so
// the union has no gap.
inline Range visible_to_any(const AttentionParams& p, int64_t b, Range queries) {
  return Range{visible(p, b, queries.begin).begin, visible(p, b, queries.end - 1).end};
}

}  // namespace longrope
