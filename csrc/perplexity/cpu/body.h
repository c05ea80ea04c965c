// What perplexity.cpp calls, for one instruction set (no include guard: the body of foreach_isa.h).
#include "common/cpu/vocabulary_body.h"

namespace perplexity {

// clang-format off
#include "perplexity/cpu/pack_body.h"
#include "perplexity/cpu/tile_body.h"
#include "perplexity/cpu/problem_body.h"
#include "perplexity/cpu/forward_body.h"
#include "perplexity/cpu/blocks_body.h"
#include "perplexity/cpu/backward_body.h"
#include "perplexity/cpu/forward_gradient_body.h"
// clang-format on

// Calls visit with the Problem of the element type and of what its products take.
template <class Visit>
inline void for_problem(const LinearNllParams& params, const Runtime& runtime, const Visit& visit) {
  // oneDNN's bfloat16 kernels take k in whole blocks of 32; real models have that.
  const bool native = runtime.bfloat16_product && params.embed % 32 == 0 && isa() == best_isa();
  for_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (native) return visit(Problem<T, T>{params, runtime});
    }
    visit(Problem<T, RealOf<T>>{params, runtime});
  });
}

inline void forward(const LinearNllParams& params, const Runtime& runtime) {
  for_problem(params, runtime, [](const auto& problem) { forward_all(problem); });
}

inline void backward(const LinearNllParams& params, const Runtime& runtime) {
  for_problem(params, runtime, [](const auto& problem) { backward_all(problem); });
}

inline void forward_with_gradient(const LinearNllParams& params, const Runtime& runtime) {
  for_problem(params, runtime, [](const auto& problem) { forward_with_gradient_all(problem); });
}

inline void scale(const LinearNllScaleParams& params, int64_t begin, int64_t end) {
  for_dtype(params.dtype, [&](auto zero) { scale_gradient<decltype(zero)>(params, begin, end); });
}

}  // namespace perplexity
