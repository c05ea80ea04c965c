// longrope::linear_nll, its backward and candidate_sums: checks, allocation, and on the CPU the
// threads and matrix products that torch carries. See csrc/perplexity/perplexity.h; linear_nll on
// CUDA is in perplexity_chunks.h.
#include "perplexity/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "bindings/bfloat16_product.h"
#include "bindings/cuda.h"
#include "bindings/perplexity_arguments.h"
#ifdef LONGROPE_CUDA
#include "bindings/perplexity_chunks.h"
#endif

namespace longrope {
namespace {

using namespace perplexity_bindings;

void float_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                   const void* a, const void* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const float*>(a),
                              static_cast<const float*>(b), c, /*is_vnni=*/false);
}

Runtime runtime_for(DType dtype) {
  Runtime runtime;
  runtime.threads = at::get_num_threads();
  runtime.for_each = [](int64_t count, const std::function<void(int64_t)>& body) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  };
  runtime.float_product = float_product;
  runtime.bfloat16_product = dtype == DType::kBFloat16 ? bfloat16_product() : nullptr;
  // The tile registers' configuration belongs to whoever multiplies next.
  if (runtime.bfloat16_product) runtime.end_of_task = release_bfloat16_product;
  return runtime;
}

std::tuple<Tensor, Tensor> linear_nll(const Tensor& hidden, const Tensor& weight,
                                      const Tensor& targets, int64_t ignore_index,
                                      std::optional<double> softcap) {
  const Tensor held = targets.contiguous();
  LinearNllParams params = params_for(hidden, weight, held, ignore_index, softcap);
  const auto options = hidden.options().dtype(real_type(hidden));
  Tensor nll = at::empty({params.rows}, options), stats = at::empty({2, params.rows}, options);
  params.nll = nll.mutable_data_ptr();
  params.stats = stats.mutable_data_ptr();
  linear_nll_cpu(params, runtime_for(params.dtype));
  return {nll, stats};
}

std::tuple<Tensor, Tensor> linear_nll_backward(const Tensor& grad_nll, const Tensor& hidden,
                                               const Tensor& weight, const Tensor& targets,
                                               const Tensor& stats, int64_t ignore_index,
                                               std::optional<double> softcap, bool need_hidden,
                                               bool need_weight) {
  const Tensor held = targets.contiguous();
  LinearNllParams params = params_for(hidden, weight, held, ignore_index, softcap);
  check("grad_nll", grad_nll, real_type(hidden), {params.rows}, hidden);
  check("stats", stats, real_type(hidden), {2, params.rows}, hidden);
  const Tensor grad = grad_nll.contiguous(), saved = stats.contiguous();
  params.grad_nll = grad.const_data_ptr();
  params.stats = const_cast<void*>(saved.const_data_ptr());  // the backward only reads it
  const auto room = [](bool needed, const Tensor& like, void*& data) {
    Tensor t = at::empty(needed ? like.sizes() : at::IntArrayRef{0}, like.options());
    if (needed) data = t.mutable_data_ptr();
    return t;
  };
  Tensor grad_hidden = room(need_hidden, hidden, params.grad_hidden);
  Tensor grad_weight = room(need_weight, weight, params.grad_weight);
  linear_nll_backward_cpu(params, runtime_for(params.dtype));
  return {grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor> linear_nll_with_gradient(const Tensor& hidden, const Tensor& weight,
                                                    const Tensor& targets, const Tensor& /*edge*/,
                                                    int64_t ignore_index,
                                                    std::optional<double> softcap) {
  const Tensor held = targets.contiguous();
  LinearNllParams params = params_for(hidden, weight, held, ignore_index, softcap);
  Tensor nll = at::empty({params.rows}, hidden.options().dtype(real_type(hidden)));
  Tensor gradient = at::empty(hidden.sizes(), hidden.options());
  params.nll = nll.mutable_data_ptr();
  params.grad_hidden = gradient.mutable_data_ptr();
  linear_nll_with_gradient_cpu(params, runtime_for(params.dtype));
  return {nll, gradient};
}

Tensor linear_nll_scale(const Tensor& grad_nll, const Tensor& gradient, const Tensor& targets,
                        const Tensor& /*edge*/, int64_t ignore_index) {
  const Scaling scaling(grad_nll, gradient, targets, ignore_index);
  const LinearNllScaleParams& params = scaling.params;
  at::parallel_for(0, params.rows, 1 + 32768 / std::max<int64_t>(params.embed, 1),
                   [&](int64_t begin, int64_t end) { linear_nll_scale_cpu(params, begin, end); });
  return scaling.out;
}

std::tuple<Tensor, Tensor> candidate_sums(const Tensor& nll, const Tensor& targets,
                                          const Tensor& candidate, int64_t candidates,
                                          int64_t ignore_index) {
  LONGROPE_EXPECT(nll.dim() == 1 && nll.layout() == at::kStrided, "nll",
                  "[T] on " + nll.device().str(), on_device(nll));
  const DType dtype = dtype_of("nll", nll);
  LONGROPE_EXPECT(real_bytes_of(dtype) == bytes_of(dtype), "nll", "float32 or float64",
                  on_device(nll));
  check("targets", targets, at::kLong, nll.sizes(), nll);
  check("candidate", candidate, at::kLong, nll.sizes(), nll);
  LONGROPE_EXPECT(candidates >= 0, "candidates", "a count", candidates);
  const int64_t rows = nll.size(0);
  Tensor sums = at::empty({candidates}, nll.options().dtype(at::kDouble));
  Tensor counts = at::empty({candidates}, targets.options());
  HeldTensors held;
  const auto* target = held.hold<int64_t>(targets);
  const auto* owner = held.hold<int64_t>(candidate);
  const Tensor values = nll.contiguous();
  double* const sum = sums.mutable_data_ptr<double>();
  int64_t* const count = counts.mutable_data_ptr<int64_t>();
#ifdef LONGROPE_CUDA
  if (nll.is_cuda()) {
    on_device_of(nll, [&](void* stream) {
      candidate_sums_cuda({values.const_data_ptr<float>(), target, owner, rows, candidates,
                           ignore_index, sum, count},
                          stream);
    });
    return {sums, counts};
  }
#endif
  for (int64_t t = 0; t < rows; ++t) {
    LONGROPE_EXPECT(owner[t] >= 0 && owner[t] < candidates, "candidate",
                    "values in [0, " + std::to_string(candidates) + ")",
                    std::to_string(owner[t]) + " at row " + std::to_string(t));
  }
  candidate_sums_cpu(values.const_data_ptr(), dtype == DType::kFloat64, target, owner, rows,
                     candidates, ignore_index, sum, count);
  return {sums, counts};
}

#ifdef LONGROPE_CUDA
std::tuple<Tensor, Tensor> linear_nll_cuda(const Tensor& hidden, const Tensor& weight,
                                           const Tensor& targets, int64_t ignore_index,
                                           std::optional<double> softcap) {
  return linear_nll_by_chunks(hidden, weight, targets, ignore_index, softcap, nll_chunks());
}

std::tuple<Tensor, Tensor> linear_nll_with_gradient_cuda(const Tensor& hidden, const Tensor& weight,
                                                         const Tensor& targets,
                                                         const Tensor& /*edge*/,
                                                         int64_t ignore_index,
                                                         std::optional<double> softcap) {
  return linear_nll_with_gradient_by_chunks(hidden, weight, targets, ignore_index, softcap,
                                            nll_chunks());
}

Tensor linear_nll_scaled_cuda(const Tensor& grad_nll, const Tensor& gradient, const Tensor& targets,
                              const Tensor& /*edge*/, int64_t ignore_index) {
  return linear_nll_scaled(grad_nll, gradient, targets, ignore_index);
}

std::tuple<Tensor, Tensor> linear_nll_backward_cuda(const Tensor& grad_nll, const Tensor& hidden,
                                                    const Tensor& weight, const Tensor& targets,
                                                    const Tensor& stats, int64_t ignore_index,
                                                    std::optional<double> softcap, bool need_hidden,
                                                    bool need_weight) {
  return linear_nll_backward_by_chunks(grad_nll, hidden, weight, targets, stats, ignore_index,
                                       softcap, need_hidden, need_weight, nll_chunks());
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(longrope, CPU, m) {
  m.impl("linear_nll", &linear_nll);
  m.impl("linear_nll_backward", &linear_nll_backward);
  m.impl("linear_nll_with_gradient", &linear_nll_with_gradient);
  m.impl("linear_nll_scale", &linear_nll_scale);
  m.impl("candidate_sums", &candidate_sums);
}
#ifdef LONGROPE_CUDA
TORCH_LIBRARY_IMPL(longrope, CUDA, m) {
  m.impl("linear_nll", &linear_nll_cuda);
  m.impl("linear_nll_backward", &linear_nll_backward_cuda);
  m.impl("linear_nll_with_gradient", &linear_nll_with_gradient_cuda);
  m.impl("linear_nll_scale", &linear_nll_scaled_cuda);
  m.impl("candidate_sums", &candidate_sums);
}
#endif

}  // namespace longrope
