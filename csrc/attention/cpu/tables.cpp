#include "attention/cpu/tables.h"

#include <algorithm>

#include "attention/cpu/visible.h"
#include "common/dtype.h"
#include "rope/rows.h"

namespace longrope {
namespace {

constexpr int64_t kPieceTokens = 256;  // the frequencies of a piece are few against its phases

// Whether every row of the batch turns by the same phases, at the same positions.
bool is_shared(const RopeParams& p) {
  return p.positions_batch_stride == 0 && p.turn.inv_freq_stride == 0 &&
         p.turn.base_inv_freq_stride == 0 &&
         (!p.turn.start_tokens_rows || p.turn.start_tokens_stride == 0) &&
         (!p.attention_factor_rows || p.attention_factor_stride == 0);
}

// The first row of what is returned is row `row` under tier `tier`.
RopeParams turn_of(RopeParams p, int64_t row, int64_t tier) {
  p.attention_factor = factor_of(p, p.turn, row, tier);
  p.attention_factor_rows = nullptr;
  p.turn.start_tokens = start_tokens_of(p.turn, row, tier);
  p.turn.start_tokens_rows = nullptr;
  p.turn.inv_freq = frequencies_of(p.turn, row, tier, false, p.pairs);
  if (p.turn.base_inv_freq) p.turn.base_inv_freq += row * p.turn.base_inv_freq_stride;
  p.turn.tiers = 1;
  p.positions += row * p.positions_batch_stride;
  return p;
}

}  // namespace

AttentionTables::AttentionTables(const AttentionParams& p, const int64_t* query_begin)
    : rotation_(*p.rotation), query_begin_(query_begin), memory_(0) {
  const int64_t tiers = rotation_.q.turn.tiers, pairs = rotation_.q.pairs;
  const auto queries_of = [&](int64_t b, int64_t tier) {
    const int64_t* const begin = query_begin + b * (tiers + 1) + tier;
    return Range{begin[0], begin[1]};
  };
  bool shared = is_shared(rotation_.q) && is_shared(rotation_.k);
  for (int64_t i = 0; i < p.batch * (tiers + 1) && shared; ++i) {
    shared = query_begin[i] == query_begin[i % (tiers + 1)];
  }
  const int64_t rows = shared ? 1 : p.batch;

  // Tokens of every table, one after another.
  std::vector<Range> key_ranges(rows * tiers);
  int64_t tokens = 0;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t tier = 0; tier < tiers; ++tier) {
      const Range queries = queries_of(b, tier);
      Range keys{p.keys, 0};
      for (int64_t other = b; other < (shared ? p.batch : b + 1); ++other) {
        if (queries.begin >= queries.end) break;
        const Range seen = visible_to_any(p, other, queries);
        if (seen.begin >= seen.end) continue;
        keys = Range{std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
      }
      key_ranges[b * tiers + tier] = keys;
      tokens += std::max<int64_t>(queries.end - queries.begin, 0);
      tokens += std::max<int64_t>(keys.end - keys.begin, 0);
    }
  }
  const int64_t row_bytes = pairs * real_bytes_of(p.dtype);
  memory_ = Buffer<char>(2 * tokens * row_bytes);
  char* next = memory_;
  const auto take = [&](Range range) {
    const int64_t bytes = std::max<int64_t>(range.end - range.begin, 0) * row_bytes;
    const AttentionTable table{next, next + bytes, range.begin, pairs, rotation_.q.interleaved};
    next += 2 * bytes;
    return table;
  };
  // What tokens `range` of the table have in it.
  const auto add = [&](const RopeParams& turn, int64_t b, int64_t tier, const AttentionTable& table,
                       Range range) {
    if (range.begin >= range.end) return;
    turns_.push_back(turn_of(turn, b, tier));
    for (int64_t t = range.begin; t < range.end; t += kPieceTokens) {
      const int64_t offset = (t - table.first) * row_bytes;
      const auto at = [&](const void* values) {
        return const_cast<char*>(static_cast<const char*>(values)) + offset;
      };
      pieces_.push_back({turns_.size() - 1, t, std::min(t + kPieceTokens, range.end), at(table.cos),
                         at(table.sin)});
    }
  };
  for (int64_t b = 0; b < rows; ++b) {
    queries_.push_back(take({queries_of(b, 0).begin, queries_of(b, tiers - 1).end}));
    for (int64_t tier = 0; tier < tiers; ++tier) {
      const Range keys = key_ranges[b * tiers + tier];
      keys_.push_back(take(keys));
      add(rotation_.q, b, tier, queries_.back(), queries_of(b, tier));
      add(rotation_.k, b, tier, keys_.back(), keys);
    }
  }
  for (int64_t b = rows; b < p.batch; ++b) {
    queries_.push_back(queries_.front());
    for (int64_t tier = 0; tier < tiers; ++tier) keys_.push_back(keys_[tier]);
  }
}

int64_t AttentionTables::piece_values() const { return kPieceTokens * rotation_.q.pairs; }

void AttentionTables::fill(int64_t piece) const {
  const Piece& p = pieces_[piece];
  rope_table_cpu(turns_[p.turn], p.begin, p.end, p.cos, p.sin);
}

AttentionTiers AttentionTables::tiers() const {
  return {rotation_.q.turn.tiers, query_begin_, queries_.data(), keys_.data()};
}

}  // namespace longrope
