// CPU implementations of linear_nll, its backward and candidate_sums: checks, and the threads and
// matrix products that torch carries for the torch-free code in csrc/perplexity/cpu.
#include "perplexity/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "bindings/bfloat16_product.h"
#include "bindings/check.h"

namespace longrope {
namespace {

namespace blas = at::native::cpublas;

void float_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                   const void* a, const void* b, float* c) {
  blas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const float*>(a),
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

DType dtype_of(const at::Tensor& hidden) {
  switch (hidden.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      LONGROPE_EXPECT(false, "hidden", "float32, bfloat16, float16 or float64 [T, E]",
                      describe(hidden));
  }
}

at::ScalarType result_type(const at::Tensor& hidden) {
  return hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Dense, on the CPU, of this dtype and shape.
bool is(const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
  return tensor.layout() == at::kStrided && tensor.device().is_cpu() &&
         tensor.scalar_type() == dtype && tensor.sizes() == sizes;
}

std::string on_device(const at::Tensor& tensor) {
  return describe(tensor) + " on " + tensor.device().str();
}

LinearNllParams params_for(const at::Tensor& hidden, const at::Tensor& weight,
                           const at::Tensor& targets, int64_t ignore_index,
                           std::optional<double> softcap) {
  LinearNllParams params = {};
  LONGROPE_EXPECT(hidden.dim() == 2 && is(hidden, hidden.scalar_type(), hidden.sizes()), "hidden",
                  "[T, E] on cpu", on_device(hidden));
  params.dtype = dtype_of(hidden);
  LONGROPE_EXPECT(weight.dim() == 2 && weight.size(1) == hidden.size(1) &&
                      is(weight, hidden.scalar_type(), weight.sizes()),
                  "weight",
                  "[V, E] of hidden's E, dtype and device, hidden is " + on_device(hidden),
                  on_device(weight));
  params.rows = hidden.size(0);
  params.embed = hidden.size(1);
  params.vocab = weight.size(0);
  LONGROPE_EXPECT(is(targets, at::kLong, {params.rows}), "targets",
                  "int64 [" + std::to_string(params.rows) + "] on cpu", on_device(targets));
  LONGROPE_EXPECT(!softcap || (std::isfinite(*softcap) && *softcap > 0.0), "softcap",
                  "None or a positive number", softcap.value_or(0.0));
  params.softcap = softcap.value_or(0.0);
  params.ignore_index = ignore_index;
  params.hidden = {hidden.const_data_ptr(), hidden.stride(0), hidden.stride(1)};
  params.weight = {weight.const_data_ptr(), weight.stride(0), weight.stride(1)};
  params.targets = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < params.rows; ++t) {
    const int64_t target = params.targets[t];
    LONGROPE_EXPECT(target == ignore_index || (target >= 0 && target < params.vocab), "targets",
                    "values in [0, " + std::to_string(params.vocab) + ") or ignore_index " +
                        std::to_string(ignore_index),
                    std::to_string(target) + " at row " + std::to_string(t));
  }
  return params;
}

std::tuple<at::Tensor, at::Tensor> linear_nll_cpu(const at::Tensor& hidden,
                                                  const at::Tensor& weight,
                                                  const at::Tensor& targets, int64_t ignore_index,
                                                  std::optional<double> softcap) {
  const at::Tensor rows = targets.contiguous();
  LinearNllParams params = params_for(hidden, weight, rows, ignore_index, softcap);
  const auto options = hidden.options().dtype(result_type(hidden));
  at::Tensor nll = at::empty({params.rows}, options);
  at::Tensor stats = at::empty({2, params.rows}, options);
  params.nll = nll.mutable_data_ptr();
  params.stats = stats.mutable_data_ptr();
  linear_nll_forward(params, runtime_for(params.dtype));
  return {nll, stats};
}

std::tuple<at::Tensor, at::Tensor> linear_nll_backward_cpu(
    const at::Tensor& grad_nll, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& targets, const at::Tensor& stats, int64_t ignore_index,
    std::optional<double> softcap, bool need_hidden, bool need_weight) {
  const at::Tensor rows = targets.contiguous();
  LinearNllParams params = params_for(hidden, weight, rows, ignore_index, softcap);
  const auto type = result_type(hidden);
  LONGROPE_EXPECT(is(grad_nll, type, {params.rows}), "grad_nll",
                  "the shape, dtype and device of nll", on_device(grad_nll));
  LONGROPE_EXPECT(is(stats, type, {2, params.rows}), "stats", "the forward's stats [2, T]",
                  on_device(stats));
  const at::Tensor grad = grad_nll.contiguous(), saved = stats.contiguous();
  params.grad_nll = grad.const_data_ptr();
  params.stats = const_cast<void*>(saved.const_data_ptr());  // the backward only reads it
  at::Tensor grad_hidden = at::empty({0}, hidden.options());
  at::Tensor grad_weight = at::empty({0}, weight.options());
  if (need_hidden) {
    grad_hidden = at::empty(hidden.sizes(), hidden.options());
    params.grad_hidden = grad_hidden.mutable_data_ptr();
  }
  if (need_weight) {
    grad_weight = at::empty(weight.sizes(), weight.options());
    params.grad_weight = grad_weight.mutable_data_ptr();
  }
  linear_nll_backward(params, runtime_for(params.dtype));
  return {grad_hidden, grad_weight};
}

std::tuple<at::Tensor, at::Tensor> candidate_sums_cpu(const at::Tensor& nll,
                                                      const at::Tensor& targets,
                                                      const at::Tensor& candidate,
                                                      int64_t candidates, int64_t ignore_index) {
  LONGROPE_EXPECT(
      nll.dim() == 1 && (is(nll, at::kFloat, nll.sizes()) || is(nll, at::kDouble, nll.sizes())),
      "nll", "float32 or float64 [T] on cpu", on_device(nll));
  LONGROPE_EXPECT(is(targets, at::kLong, nll.sizes()), "targets", "int64 of nll's shape on cpu",
                  on_device(targets));
  LONGROPE_EXPECT(is(candidate, at::kLong, nll.sizes()), "candidate",
                  "int64 [" + std::to_string(nll.size(0)) + "] on cpu", on_device(candidate));
  LONGROPE_EXPECT(candidates >= 0, "candidates", "a count", candidates);
  const at::Tensor of_row = candidate.contiguous();
  const int64_t* owner = of_row.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < nll.size(0); ++t) {
    LONGROPE_EXPECT(owner[t] >= 0 && owner[t] < candidates, "candidate",
                    "values in [0, " + std::to_string(candidates) + ")",
                    std::to_string(owner[t]) + " at row " + std::to_string(t));
  }
  at::Tensor sums = at::empty({candidates}, nll.options().dtype(at::kDouble));
  at::Tensor counts = at::empty({candidates}, targets.options());
  const at::Tensor values = nll.contiguous(), rows = targets.contiguous();
  candidate_sums(values.const_data_ptr(), nll.scalar_type() == at::kDouble,
                 rows.const_data_ptr<int64_t>(), owner, nll.size(0), candidates, ignore_index,
                 sums.mutable_data_ptr<double>(), counts.mutable_data_ptr<int64_t>());
  return {sums, counts};
}

}  // namespace
}  // namespace longrope

TORCH_LIBRARY_IMPL(longrope, CPU, m) {
  m.impl("linear_nll", &longrope::linear_nll_cpu);
  m.impl("linear_nll_backward", &longrope::linear_nll_backward_cpu);
  m.impl("candidate_sums", &longrope::candidate_sums_cpu);
}
