// What holds for one row of the batch, on the CPU and on CUDA.
#pragma once

#include "common/host_device.h"
#include "rope/rope.h"

namespace longrope {

// Of a row: negative where it does not turn (or turn back), beyond the last where none is known.
struct RowTiers {
  int64_t turn, undo;
};

LONGROPE_HOST_DEVICE inline RowTiers tiers_of(const RopeParams& p, int64_t row) {
  return {p.turn.tier_rows ? p.turn.tier_rows[row] : 0,
          p.undo.tier_rows ? p.undo.tier_rows[row] : 0};
}

LONGROPE_HOST_DEVICE inline bool has_tier(const RopeFrequencies& f, int64_t tier) {
  return 0 <= tier && tier < f.tiers;
}

// Whether each row goes from a tier to a tier.
LONGROPE_HOST_DEVICE inline bool changes_tiers(const RopeParams& p) {
  return p.turn.tier_rows && p.undo.tier_rows;
}

// Whether the row stays as it is.
LONGROPE_HOST_DEVICE inline bool stays(const RopeParams& p, RowTiers tiers) {
  return changes_tiers(p) && tiers.turn == tiers.undo;
}

// [pairs] of a tier that exists; those `below` the start tokens have the base frequencies.
LONGROPE_HOST_DEVICE inline const double* frequencies_of(const RopeFrequencies& f, int64_t row,
                                                         int64_t tier, bool below, int64_t pairs) {
  return below ? f.base_inv_freq + row * f.base_inv_freq_stride
               : f.inv_freq + row * f.inv_freq_stride + tier * pairs;
}

LONGROPE_HOST_DEVICE inline int64_t start_tokens_of(const RopeFrequencies& f, int64_t row,
                                                    int64_t tier) {
  if (!f.base_inv_freq || !has_tier(f, tier)) return 0;
  return f.start_tokens_rows ? f.start_tokens_rows[row * f.start_tokens_stride + tier]
                             : f.start_tokens;
}

LONGROPE_HOST_DEVICE inline bool is_below(int64_t start_tokens, int64_t position) {
  return start_tokens > 0 && position < start_tokens;
}

// Of one tier; 1 where there is none.
LONGROPE_HOST_DEVICE inline double factor_of(const RopeParams& p, const RopeFrequencies& f,
                                             int64_t row, int64_t tier) {
  if (!has_tier(f, tier)) return 1;
  return p.attention_factor_rows ? p.attention_factor_rows[row * p.attention_factor_stride + tier]
                                 : p.attention_factor;
}

LONGROPE_HOST_DEVICE inline double factor_of(const RopeParams& p, int64_t row, RowTiers tiers) {
  if (!p.turn.inv_freq) return factor_of(p, p.undo, row, tiers.undo);
  const double factor = factor_of(p, p.turn, row, tiers.turn);
  return changes_tiers(p) ? factor / factor_of(p, p.undo, row, tiers.undo) : factor;
}

LONGROPE_HOST_DEVICE inline int64_t position_of(const RopeParams& p, int64_t row, int64_t token) {
  return p.positions[row * p.positions_batch_stride + token * p.positions_token_stride];
}

}  // namespace longrope
