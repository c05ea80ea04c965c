// What holds for one group of heads, and for one row of the batch, on the CPU and on CUDA.
#pragma once

#include <initializer_list>

#include "common/host_device.h"
#include "rope/rope.h"

namespace longrope {

// In elements of 16 bits on the CPU: the tokens from one position that has its phase to the next.
constexpr int64_t kPhaseSpacing = 16;

inline RopeTensor group_of(RopeTensor t, const RopeParams& p, int64_t group) {
  t.heads /= p.groups;
  const int64_t elements = group * t.heads * t.head_stride;
  if (t.data) t.data = static_cast<char*>(t.data) + elements * bytes_of(p.dtype);
  return t;
}

// The share of one group of heads: what follows here, and the kernels, see its heads alone, and its
// frequencies and factors as those of all of them.
inline RopeParams group_of(const RopeParams& p, int64_t group) {
  RopeParams share = p;
  for (RopeTensor RopeParams::* t :
       {&RopeParams::q, &RopeParams::k, &RopeParams::q_out, &RopeParams::k_out}) {
    share.*t = group_of(p.*t, p, group);
  }
  for (RopeFrequencies* f : {&share.turn, &share.undo}) {
    if (f->inv_freq) f->inv_freq += group * f->inv_freq_group_stride;
  }
  if (p.attention_factor_rows) {
    share.attention_factor_rows += group * p.attention_factor_group_stride;
  }
  return share;
}

// The same of gradients; `blocks` of sums a row.
inline RopeBackwardParams group_of(const RopeBackwardParams& params, int64_t group,
                                   int64_t blocks) {
  const RopeParams& p = params.forward;
  RopeBackwardParams share{group_of(p, group), group_of(params.grad_q, p, group),
                           group_of(params.grad_k, p, group), params.partial};
  share.partial += group * p.batch * blocks * (2 * p.pairs + 1);
  return share;
}

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
