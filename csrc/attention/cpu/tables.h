// The cosines and sines that a rotation takes on the CPU: made before the tasks, by all threads.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/visible.h"
#include "common/cpu/memory.h"

namespace longrope {

// Of the queries that attend, and for every tier of every row of the batch of the keys that its
// queries see, or of offsets where those do. Rows that turn alike share them.
class AttentionTables {
 public:
  // `query_begin` as in AttentionTiers; it and what `params` point to live as long as this.
  AttentionTables(const AttentionParams& params, const int64_t* query_begin);

  // The work: every piece once, on any thread, before the tasks.
  int64_t pieces() const { return static_cast<int64_t>(pieces_.size()); }
  int64_t piece_values() const;  // cosines of one, at most
  void fill(int64_t piece) const;

  AttentionTiers tiers() const;

 private:
  // Tokens [begin, end) under the rotation of one row and tier, with where their values go.
  struct Piece {
    size_t turn;
    int64_t begin, end;
    char *cos, *sin;
  };

  Range queries_of(int64_t b, int64_t tier) const;
  void make_tables(const AttentionParams& params, int64_t rows,
                   const std::vector<Range>& key_ranges, int64_t tokens);
  void make_offsets(const AttentionParams& params, int64_t rows,
                    const std::vector<Range>& key_ranges);

  const AttentionRotation& rotation_;
  const int64_t* query_begin_;
  std::vector<RopeParams> turns_;
  std::vector<Piece> pieces_;
  std::vector<AttentionTable> queries_, keys_;
  Buffer<char> memory_;
};

}  // namespace longrope
