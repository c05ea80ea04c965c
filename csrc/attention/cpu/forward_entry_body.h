// What forward.cpp calls, for one instruction set (no include guard: the body of foreach_isa.h).
#include "common/cpu/vocabulary_body.h"

namespace attention {

#include "attention/cpu/common_body.h"
#include "attention/cpu/forward_body.h"
#include "attention/cpu/library_forward_body.h"
#include "attention/cpu/tile_forward_body.h"
// forward_body.h first
#include "attention/cpu/merge_body.h"
#include "attention/cpu/splits_body.h"

inline void forward_sizes(const AttentionParams& p, AttentionPlan* plan) {
  if (plan->bfloat16_products) {
    LibraryProducts<BFloat16>(p, *plan, nullptr, &plan->scratch);
  } else if (p.dtype == DType::kFloat64) {
    TileProducts<double>(p, *plan, nullptr, &plan->scratch);
  } else {
    TileProducts<float>(p, *plan, nullptr, &plan->scratch);
  }
}

inline void forward(const AttentionParams& p, const AttentionPlan& plan, int64_t task,
                    void* workspace, void* scratch) {
  if (plan.bfloat16_products) {
    return forward_task<BFloat16, LibraryProducts>(p, plan, task, workspace, scratch);
  }
  for_dtype(p.dtype, [&](auto zero) {
    forward_task<decltype(zero), TileProducts>(p, plan, task, workspace, scratch);
  });
}

inline void merge_splits(const AttentionParams& p, const AttentionPlan& plan, const void* workspace,
                         int64_t begin, int64_t end) {
  for_dtype(p.dtype,
            [&](auto zero) { merge_rows<decltype(zero)>(p, plan, workspace, begin, end); });
}

inline void merge(const AttentionMergeParams& p, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto zero) { merge_pair<decltype(zero)>(p, begin, end); });
}

}  // namespace attention
