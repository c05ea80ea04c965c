// What the bindings of linear_nll check, on the CPU and on CUDA, and how they describe tensors to
// the kernels (csrc/perplexity/perplexity.h).
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <string>

#include "bindings/arguments.h"
#include "perplexity/perplexity.h"

namespace longrope::perplexity_bindings {

inline std::string on_device(const Tensor& t) { return describe(t) + " on " + t.device().str(); }

// Dense, of this dtype and shape, on the device of `like`.
inline void check(const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes,
                  const Tensor& like) {
  std::ostringstream expected;
  expected << dtype_name(dtype) << " " << sizes << " on " << like.device();
  LONGROPE_EXPECT(t.layout() == at::kStrided && t.scalar_type() == dtype && t.sizes() == sizes &&
                      t.device() == like.device(),
                  name, expected.str(), on_device(t));
}

// The values of targets are checked on the CPU alone: on CUDA that would wait for the device.
inline LinearNllParams params_for(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                  int64_t ignore_index, std::optional<double> softcap) {
  LinearNllParams params = {};
  LONGROPE_EXPECT(hidden.dim() == 2 && hidden.layout() == at::kStrided, "hidden",
                  "[T, E] on " + hidden.device().str(), on_device(hidden));
  params.dtype = dtype_of("hidden", hidden);
  LONGROPE_EXPECT(
      weight.dim() == 2 && weight.size(1) == hidden.size(1) && weight.layout() == at::kStrided &&
          weight.device() == hidden.device() && weight.scalar_type() == hidden.scalar_type(),
      "weight", "[V, E] of hidden's E, dtype and device, hidden is " + on_device(hidden),
      on_device(weight));
  params.rows = hidden.size(0);
  params.embed = hidden.size(1);
  params.vocab = weight.size(0);
  check("targets", targets, at::kLong, {params.rows}, hidden);
  LONGROPE_EXPECT(!softcap || (std::isfinite(*softcap) && *softcap > 0.0), "softcap",
                  "None or a positive number", softcap.value_or(0.0));
  params.softcap = softcap.value_or(0.0);
  params.ignore_index = ignore_index;
  params.hidden = {hidden.const_data_ptr(), hidden.stride(0), hidden.stride(1)};
  params.weight = {weight.const_data_ptr(), weight.stride(0), weight.stride(1)};
  params.targets = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; targets.is_cpu() && t < params.rows; ++t) {
    const int64_t target = params.targets[t];
    LONGROPE_EXPECT(target == ignore_index || (target >= 0 && target < params.vocab), "targets",
                    "values in [0, " + std::to_string(params.vocab) + ") or ignore_index " +
                        std::to_string(ignore_index),
                    std::to_string(target) + " at row " + std::to_string(t));
  }
  return params;
}

// What linear_nll_scale takes, dense, and its output.
struct Scaling {
  Tensor grad_nll, gradient, targets, out;
  LinearNllScaleParams params;

  Scaling(const Tensor& given_grad_nll, const Tensor& given_gradient, const Tensor& given_targets,
          int64_t ignore_index) {
    LONGROPE_EXPECT(given_gradient.dim() == 2 && given_gradient.layout() == at::kStrided,
                    "gradient", "[T, E] on " + given_gradient.device().str(),
                    on_device(given_gradient));
    const DType dtype = dtype_of("gradient", given_gradient);
    const int64_t rows = given_gradient.size(0), embed = given_gradient.size(1);
    check("grad_nll", given_grad_nll, real_type(given_gradient), {rows}, given_gradient);
    check("targets", given_targets, at::kLong, {rows}, given_gradient);
    grad_nll = given_grad_nll.contiguous();
    gradient = given_gradient.contiguous();
    targets = given_targets.contiguous();
    out = at::empty(gradient.sizes(), gradient.options());
    params = {dtype,
              gradient.const_data_ptr(),
              grad_nll.const_data_ptr(),
              targets.const_data_ptr<int64_t>(),
              rows,
              embed,
              ignore_index,
              out.mutable_data_ptr()};
  }
};

}  // namespace longrope::perplexity_bindings
