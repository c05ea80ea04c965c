#include <algorithm>

#include "attention/attention.h"
#include "attention/cpu/products.h"
#include "attention/cpu/visible.h"
#include "common/cpu/vocabulary.h"
#include "common/phase.h"
#include "rope/rows.h"

#define LONGROPE_BODY "attention/cpu/forward_entry_body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope {
namespace {

constexpr int64_t kBlockRows = scalar::attention::kBlockRows;
constexpr int64_t kGroupRows = scalar::attention::kGroupRows;
constexpr int64_t kBlockKeys = scalar::attention::kBlockKeys;

}  // namespace

bool attention_streams(const AttentionParams& params) {
  return LONGROPE_DISPATCH(attention::streams)(params);
}

AttentionPlan attention_plan(const AttentionParams& p) {
  AttentionPlan plan{};
  plan.streamed = attention_streams(p) && (!p.tiers || p.tiers->keys[0].offsets);
  plan.bfloat16_products = !plan.streamed && multiplies_in_bfloat16(p);
  // Few rows against many keys: part the keys until there is work for many threads, in parts that
  // are long against the work of merging them; then part the rows. By shape alone, so that results
  // do not depend on the number of threads.
  const int64_t enough = plan.streamed ? 64 : 24;  // tasks that wait for memory end at odd times
  constexpr int64_t kLeastKeys = 4 * kBlockKeys;
  const int64_t rows = p.queries * (p.heads / p.kv_heads);
  const auto tasks = [&] {
    plan.row_blocks = ceil_div(rows, plan.block_rows);
    return std::max<int64_t>(p.batch * p.kv_heads * plan.row_blocks, 1);
  };
  plan.block_rows = kBlockRows;
  int64_t splits = ceil_div(enough, tasks());
  splits = std::max<int64_t>(std::min(splits, p.keys / kLeastKeys), 1);
  while (tasks() * splits < enough && plan.block_rows > kGroupRows) plan.block_rows /= 2;
  plan.split_keys = round_up(ceil_div(p.keys, splits), kBlockKeys);
  plan.splits = p.keys > 0 ? ceil_div(p.keys, plan.split_keys) : 1;
  plan.tasks = tasks() * plan.splits;
  LONGROPE_DISPATCH(attention::forward_sizes)(p, &plan);
  if (plan.splits > 1) {
    plan.workspace =
        plan.splits * p.batch * p.heads * p.queries * (p.head_dim + 1) * real_bytes_of(p.dtype);
  }
  return plan;
}

void attention_cpu(const AttentionParams& params, const AttentionPlan& plan, int64_t task,
                   void* workspace, void* scratch) {
  LONGROPE_DISPATCH(attention::forward)(params, plan, task, workspace, scratch);
}

void attention_merge_splits_cpu(const AttentionParams& params, const AttentionPlan& plan,
                                const void* workspace, int64_t begin, int64_t end) {
  LONGROPE_DISPATCH(attention::merge_splits)(params, plan, workspace, begin, end);
}

void attention_merge_cpu(const AttentionMergeParams& params, int64_t begin, int64_t end) {
  LONGROPE_DISPATCH(attention::merge)(params, begin, end);
}

}  // namespace longrope
