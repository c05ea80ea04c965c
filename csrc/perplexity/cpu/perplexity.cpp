#include "perplexity/perplexity.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/cpu/vocabulary.h"

#define LONGROPE_BODY "perplexity/cpu/body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope {

void linear_nll_cpu(const LinearNllParams& params, const Runtime& runtime) {
  LONGROPE_DISPATCH(perplexity::forward)(params, runtime);
}

void linear_nll_backward_cpu(const LinearNllParams& params, const Runtime& runtime) {
  LONGROPE_DISPATCH(perplexity::backward)(params, runtime);
}

void linear_nll_with_gradient_cpu(const LinearNllParams& params, const Runtime& runtime) {
  LONGROPE_DISPATCH(perplexity::forward_with_gradient)(params, runtime);
}

void linear_nll_scale_cpu(const LinearNllScaleParams& params, int64_t begin, int64_t end) {
  LONGROPE_DISPATCH(perplexity::scale)(params, begin, end);
}

void candidate_sums_cpu(const void* nll, bool wide, const int64_t* targets,
                        const int64_t* candidate, int64_t rows, int64_t candidates,
                        int64_t ignore_index, double* sums, int64_t* counts) {
  std::fill_n(sums, candidates, 0.0);
  std::fill_n(counts, candidates, int64_t{0});
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] == ignore_index) continue;
    sums[candidate[r]] +=
        wide ? static_cast<const double*>(nll)[r] : static_cast<const float*>(nll)[r];
    ++counts[candidate[r]];
  }
}

}  // namespace longrope
