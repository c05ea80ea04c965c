// What backward.cpp calls, for one instruction set (no include guard: the body of foreach_isa.h).
#include "common/cpu/vocabulary_body.h"

namespace attention {

#include "attention/cpu/common_body.h"
// common_body.h first
#include "attention/cpu/backward_body.h"
#include "attention/cpu/library_backward_body.h"
#include "attention/cpu/tile_backward_body.h"

template <typename T, template <typename> class Products>
inline void size_backward(const AttentionParams& p, AttentionPlan* plan) {
  using Real = RealOf<T>;
  Products<T>(p, nullptr, &plan->scratch);
  plan->workspace = plan->tasks * GradWorkspace<Real>::elements(p, *plan) * sizeof(Real);
}

inline void backward_sizes(const AttentionParams& p, AttentionPlan* plan) {
  if (plan->bfloat16_products) return size_backward<BFloat16, LibraryGradProducts>(p, plan);
  return p.dtype == DType::kFloat64 ? size_backward<double, TileGradProducts>(p, plan)
                                    : size_backward<float, TileGradProducts>(p, plan);
}

inline void backward(const AttentionBackwardParams& g, const AttentionPlan& plan, int64_t task,
                     void* workspace, void* scratch) {
  if (plan.bfloat16_products) {
    return backward_task<BFloat16, LibraryGradProducts>(g, plan, task, workspace, scratch);
  }
  for_dtype(g.forward.dtype, [&](auto zero) {
    backward_task<decltype(zero), TileGradProducts>(g, plan, task, workspace, scratch);
  });
}

inline void finish(const AttentionBackwardParams& g, const AttentionPlan& plan,
                   const void* workspace, int64_t begin, int64_t end) {
  for_dtype(g.forward.dtype,
            [&](auto zero) { finish_queries<decltype(zero)>(g, plan, workspace, begin, end); });
}

}  // namespace attention
