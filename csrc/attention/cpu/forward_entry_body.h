// What forward.cpp calls, for one instruction set (no include guard: the body of foreach_isa.h).
#include "common/cpu/vocabulary_body.h"

namespace attention {

// clang-format off
#include "attention/cpu/common_body.h"
#include "attention/cpu/forward_body.h"
#include "attention/cpu/tile_forward_body.h"
#include "attention/cpu/library_forward_body.h"
#include "attention/cpu/merge_body.h"
#include "attention/cpu/splits_body.h"
#include "rope/cpu/table_body.h"
#include "attention/cpu/streamed_tile_body.h"
#include "attention/cpu/streamed_forward_body.h"
// clang-format on

// Whether few rows share each key, in rows that the loads of streamed_forward_body.h fit.
inline bool streams(const AttentionParams& p) {
  const int64_t most = p.rotation                  ? kStreamedRowsThatTurn
                       : multiplies_in_bfloat16(p) ? kStreamedRowsByLibrary
                                                   : kStreamedRows;
  if (p.queries * (p.heads / p.kv_heads) > most) return false;
  bool fits = false;
  for_dtype(p.dtype, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) {
      fits = p.head_dim >= Chunk<decltype(zero)>::kElements;
    }
  });
  return fits;
}

inline void forward_sizes(const AttentionParams& p, AttentionPlan* plan) {
  if (plan->streamed) {
    for_dtype(p.dtype, [&](auto zero) {
      if constexpr (!std::is_same_v<decltype(zero), double>) {
        StreamedProducts<decltype(zero)>(p, *plan, nullptr, &plan->scratch);
      }
    });
  } else if (plan->bfloat16_products) {
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
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.streamed) {
        return forward_task<T, StreamedProducts>(p, plan, task, workspace, scratch);
      }
    }
    forward_task<T, TileProducts>(p, plan, task, workspace, scratch);
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
