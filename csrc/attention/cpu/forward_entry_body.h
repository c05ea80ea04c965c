// What forward.cpp calls, for one instruction set (no include guard: the body of foreach_isa.h).
namespace attention {

#include "attention/cpu/common_body.h"
#include "attention/cpu/forward_body.h"
#include "attention/cpu/merge_body.h"

inline size_t forward_scratch_bytes(const AttentionParams& p) {
  size_t bytes = 0;
  if (p.dtype == DType::kFloat64) {
    ForwardScratch<double>(nullptr, p.head_dim, &bytes);
  } else {
    ForwardScratch<float>(nullptr, p.head_dim, &bytes);
  }
  return bytes;
}

inline void forward(const AttentionParams& p, const AttentionPlan& plan, int64_t task,
                    void* workspace, void* scratch) {
  switch (p.dtype) {
    case DType::kFloat32:
      return forward_task<float>(p, plan, task, workspace, scratch);
    case DType::kBFloat16:
      return forward_task<BFloat16>(p, plan, task, workspace, scratch);
    case DType::kFloat16:
      return forward_task<Float16>(p, plan, task, workspace, scratch);
    case DType::kFloat64:
      return forward_task<double>(p, plan, task, workspace, scratch);
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
