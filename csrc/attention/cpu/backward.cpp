#include "attention/attention.h"
#include "attention/cpu/products.h"
#include "attention/cpu/visible.h"
#include "common/cpu/vocabulary.h"

#define LONGROPE_BODY "attention/cpu/backward_entry_body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope {

AttentionPlan attention_backward_plan(const AttentionParams& p) {
  // Threads find work in the splits of the keys. Each split has a dQ of its own in the workspace,
  // so there are few; by shape alone, so that results do not depend on the number of threads.
  constexpr int64_t kEnoughTasks = 32, kLeastKeys = 1024, kMostSplits = 8;
  constexpr int64_t kBlockKeys = scalar::attention::kBlockKeys;
  AttentionPlan plan{};
  plan.bfloat16_products = multiplies_in_bfloat16(p);
  const int64_t whole = p.batch * p.kv_heads;
  int64_t splits = ceil_div(kEnoughTasks, whole > 0 ? whole : 1);
  if (splits > kMostSplits) splits = kMostSplits;
  if (splits > p.keys / kLeastKeys) splits = p.keys / kLeastKeys;
  if (splits < 1) splits = 1;
  plan.split_keys = round_up(ceil_div(p.keys, splits), kBlockKeys);
  plan.splits = p.keys > 0 ? ceil_div(p.keys, plan.split_keys) : 1;
  plan.tasks = whole * plan.splits;
  LONGROPE_DISPATCH(attention::backward_sizes)(p, &plan);
  return plan;
}

void attention_backward_cpu(const AttentionBackwardParams& params, const AttentionPlan& plan,
                            int64_t task, void* workspace, void* scratch) {
  LONGROPE_DISPATCH(attention::backward)(params, plan, task, workspace, scratch);
}

void attention_backward_finish_cpu(const AttentionBackwardParams& params, const AttentionPlan& plan,
                                   const void* workspace, int64_t begin, int64_t end) {
  LONGROPE_DISPATCH(attention::finish)(params, plan, workspace, begin, end);
}

}  // namespace longrope
