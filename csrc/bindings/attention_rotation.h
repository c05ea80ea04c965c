// The rotation inside attention: what its bindings check, and the tiers of the queries on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "attention/attention.h"
#include "bindings/rope_arguments.h"

namespace longrope::attention_bindings {

// As the schema of attention_rotated says.
struct RotationArguments {
  const Tensor &query_positions, &key_positions;
  const OptionalTensor& limits;
  const Tensor& inv_freq;
  const OptionalTensor& base_inv_freq;
  int64_t start_tokens;
  const OptionalTensor& start_tokens_tiers;
  double attention_factor;
  const OptionalTensor& attention_factor_tiers;
  bool interleaved;
};

// Holds what the kernels' rotation points to.
class HeldRotation {
 public:
  HeldRotation(const Tensor& q, const Tensor& k, const RotationArguments& a) {
    rotation_.q = turn(q_, q, "query_positions", a.query_positions, a);
    rotation_.k = turn(k_, k, "key_positions", a.key_positions, a);
    const int64_t tiers = rotation_.q.turn.tiers;
    if (!a.limits) {
      LONGROPE_EXPECT(tiers == 1, "inv_freq", "one tier without limits", describe(a.inv_freq));
      return;
    }
    const Tensor& limits = *a.limits;
    std::ostringstream expected;
    expected << "int64 [" << tiers << "]";
    LONGROPE_EXPECT(
        limits.scalar_type() == at::kLong && limits.dim() == 1 && limits.size(0) == tiers, "limits",
        expected.str(), describe(limits));
    check_device("limits", limits, q.device());
    rotation_.limits = q_.hold<int64_t>(limits);
    for (int64_t t = 1; limits.is_cpu() && t < tiers; ++t) {
      TORCH_CHECK_VALUE(rotation_.limits[t - 1] < rotation_.limits[t],
                        "limits: expected growing positions, got ", rotation_.limits[t], " after ",
                        rotation_.limits[t - 1]);
    }
  }

  const AttentionRotation& rotation() const { return rotation_; }

  // CPU: query_begin of AttentionTiers, [batch, tiers + 1].
  std::vector<int64_t> query_begin(const AttentionParams& p) const {
    const int64_t tiers = rotation_.q.turn.tiers;
    std::vector<int64_t> begin;
    begin.reserve(p.batch * (tiers + 1));
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t tier = -1;
      const int64_t first = std::max<int64_t>(p.query_begin[b], 0);
      const int64_t end = std::max(std::min(p.query_end[b], p.queries), first);
      for (int64_t i = first; i < end; ++i) {
        const int64_t next = tier_of(b, i, tier);
        TORCH_CHECK_VALUE(next >= tier,
                          "query_positions: expected tiers that do not fall along a row, got tier ",
                          next, " after tier ", tier, " in row ", b);
        for (; tier < next; ++tier) begin.push_back(i);
      }
      for (; tier < tiers; ++tier) begin.push_back(end);
    }
    return begin;
  }

 private:
  static RopeParams turn(rope_bindings::Arguments& arguments, const Tensor& x, const char* name,
                         const Tensor& positions, const RotationArguments& a) {
    const Tensor none = x.slice(1, 0, 0);
    arguments.heads("q", x, "k", none);
    arguments.positions(positions, name);
    arguments.params.turn =
        arguments.tiers(a.inv_freq, a.base_inv_freq, a.start_tokens, a.start_tokens_tiers,
                        a.attention_factor, a.attention_factor_tiers);
    arguments.params.interleaved = a.interleaved;
    return arguments.params;
  }

  // Of query i of row b; `near` is where to begin to look.
  int64_t tier_of(int64_t b, int64_t i, int64_t near) const {
    const RopeParams& q = rotation_.q;
    const int64_t position =
        q.positions[b * q.positions_batch_stride + i * q.positions_token_stride];
    int64_t tier = std::max<int64_t>(near, 0);
    while (tier > 0 && position < rotation_.limits[tier - 1]) --tier;
    while (tier + 1 < q.turn.tiers && position >= rotation_.limits[tier]) ++tier;
    return tier;
  }

  rope_bindings::Arguments q_, k_;
  AttentionRotation rotation_{};
};

}  // namespace longrope::attention_bindings
