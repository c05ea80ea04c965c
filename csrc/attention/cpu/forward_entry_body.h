// What forward.cpp calls, for one instruction set (no include guard: the body of foreach_isa.h).
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
  switch (p.dtype) {
    case DType::kFloat32:
      return forward_task<float, TileProducts>(p, plan, task, workspace, scratch);
    case DType::kBFloat16:
      return forward_task<BFloat16, TileProducts>(p, plan, task, workspace, scratch);
    case DType::kFloat16:
      return forward_task<Float16, TileProducts>(p, plan, task, workspace, scratch);
    case DType::kFloat64:
      return forward_task<double, TileProducts>(p, plan, task, workspace, scratch);
  }
}

inline void merge_splits(const AttentionParams& p, const AttentionPlan& plan, const void* workspace,
                         int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_rows<float>(p, plan, workspace, begin, end);
    case DType::kBFloat16:
      return merge_rows<BFloat16>(p, plan, workspace, begin, end);
    case DType::kFloat16:
      return merge_rows<Float16>(p, plan, workspace, begin, end);
    case DType::kFloat64:
      return merge_rows<double>(p, plan, workspace, begin, end);
  }
}

inline void merge(const AttentionMergeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_pair<float>(p, begin, end);
    case DType::kBFloat16:
      return merge_pair<BFloat16>(p, begin, end);
    case DType::kFloat16:
      return merge_pair<Float16>(p, begin, end);
    case DType::kFloat64:
      return merge_pair<double>(p, begin, end);
  }
}

}  // namespace attention
