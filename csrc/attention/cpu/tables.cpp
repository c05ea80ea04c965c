#include "attention/cpu/tables.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <tuple>

#include "attention/cpu/visible.h"
#include "common/dtype.h"
#include "common/phase.h"
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

// 0, 1, ... for a table of offsets.
const std::array<int64_t, kOffsetKeys> kOffsets = [] {
  std::array<int64_t, kOffsetKeys> offsets;
  std::iota(offsets.begin(), offsets.end(), 0);
  return offsets;
}();

// Whether keys [begin, end) of a row stand at consecutive positions.
bool is_consecutive(const RopeParams& k, int64_t row, int64_t begin, int64_t end) {
  const int64_t* const positions = k.positions + row * k.positions_batch_stride;
  uint64_t apart = 0;
  for (int64_t j = begin; j < end; ++j) {
    const auto of = [&](int64_t at) {
      return static_cast<uint64_t>(positions[at * k.positions_token_stride]);
    };
    apart |= of(j) - of(begin) - static_cast<uint64_t>(j - begin);
  }
  return apart == 0;
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
  const int64_t tiers = rotation_.q.turn.tiers;
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
  const auto consecutive = [&] {
    for (int64_t i = 0; i < rows * tiers; ++i) {
      if (!is_consecutive(rotation_.k, i / tiers, key_ranges[i].begin, key_ranges[i].end)) {
        return false;
      }
    }
    return true;
  };
  if (attention_streams(p) && consecutive()) {
    make_offsets(p, rows, key_ranges);
  } else {
    make_tables(p, rows, key_ranges, tokens);
  }
  for (int64_t b = rows; b < p.batch; ++b) {
    queries_.push_back(queries_.front());
    for (int64_t tier = 0; tier < tiers; ++tier) keys_.push_back(keys_[tier]);
  }
}

Range AttentionTables::queries_of(int64_t b, int64_t tier) const {
  const int64_t* const begin = query_begin_ + b * (rotation_.q.turn.tiers + 1) + tier;
  return Range{begin[0], begin[1]};
}

void AttentionTables::make_tables(const AttentionParams& p, int64_t rows,
                                  const std::vector<Range>& key_ranges, int64_t tokens) {
  const int64_t tiers = rotation_.q.turn.tiers, pairs = rotation_.q.pairs;
  const int64_t row_bytes = pairs * real_bytes_of(p.dtype);
  memory_ = Buffer<char>(2 * tokens * row_bytes);
  char* next = memory_;
  const auto take = [&](Range range) {
    const int64_t bytes = std::max<int64_t>(range.end - range.begin, 0) * row_bytes;
    const AttentionTable table{next,   next + bytes, range.begin, pairs, rotation_.q.interleaved,
                               nullptr};
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
}

void AttentionTables::make_offsets(const AttentionParams& p, int64_t rows,
                                   const std::vector<Range>& key_ranges) {
  const int64_t tiers = rotation_.q.turn.tiers, pairs = rotation_.q.pairs;
  const int64_t table_bytes = kOffsetKeys * pairs * real_bytes_of(p.dtype);
  const int64_t phase_count = rows * (p.queries + 2 * tiers) * pairs;
  const auto carve = [&](void* memory) {
    Carver carver(memory);
    // The last tile of a block may read some rows behind those of its keys.
    char* const tables = carver.take<char>((4 * rows * tiers + 1) * table_bytes);
    uint64_t* const phases = carver.take<uint64_t>(phase_count);
    AttentionOffsets* const offsets = carver.take<AttentionOffsets>(rows * tiers);
    return std::tuple(tables, phases, offsets, carver.bytes());
  };
  memory_ = Buffer<char>(std::get<3>(carve(nullptr)));
  auto [table, phases, all_offsets, bytes] = carve(memory_);
  std::fill_n(phases, phase_count, 0);
  std::fill_n(all_offsets, rows * tiers, AttentionOffsets{});
  for (int64_t b = 0; b < rows; ++b) {
    queries_.push_back(AttentionTable{});  // turned block by block
    uint64_t* const query_phases = phases;
    phases += p.queries * pairs;
    for (int64_t tier = 0; tier < tiers; ++tier, phases += 2 * pairs, table += 4 * table_bytes) {
      AttentionOffsets& offsets = all_offsets[b * tiers + tier];
      keys_.push_back(
          {table, table + 2 * table_bytes, 0, pairs, rotation_.q.interleaved, &offsets});
      const Range queries = queries_of(b, tier), keys = key_ranges[b * tiers + tier];
      if (queries.begin >= queries.end) continue;
      RopeParams q = turn_of(rotation_.q, b, tier), k = turn_of(rotation_.k, b, tier);
      const int64_t start = start_tokens_of(k.turn, 0, 0);
      offsets = {query_phases, phases, 0, 0, k.attention_factor};
      if (keys.begin < keys.end) {
        // Wraps as the phases do.
        const uint64_t position = static_cast<uint64_t>(position_of(k, 0, keys.begin));
        offsets.position = static_cast<int64_t>(position - static_cast<uint64_t>(keys.begin));
        if (start > 0 && __builtin_sub_overflow(start, offsets.position, &offsets.start_keys)) {
          offsets.start_keys = std::numeric_limits<int64_t>::max();
        }
      }
      for (int below = 0; below < (start > 0 ? 2 : 1); ++below) {
        const double* const inv_freq = frequencies_of(k.turn, 0, 0, below, pairs);
        std::transform(inv_freq, inv_freq + pairs, phases + below * pairs, turns_per_token);
      }
      for (int64_t i = queries.begin; i < queries.end; ++i) {
        const int64_t position = position_of(q, 0, i);
        const uint64_t* const turns = phases + is_below(start, position) * pairs;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          query_phases[i * pairs + pair] = static_cast<uint64_t>(position) * turns[pair];
        }
      }
      k.positions = kOffsets.data();
      k.positions_token_stride = 1;
      for (int below = 0; below < (offsets.start_keys > keys.begin ? 2 : 1); ++below) {
        k.turn.inv_freq = frequencies_of(k.turn, 0, 0, below, pairs);
        k.turn.start_tokens = 0;
        turns_.push_back(k);
        pieces_.push_back({turns_.size() - 1, 0, kOffsetKeys, table + below * table_bytes,
                           table + (2 + below) * table_bytes});
      }
    }
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
