// longrope::linear_nll as a build for CUDA compiles it, over the emulated kernels: the functions of
// csrc/bindings/perplexity_chunks.h with a device that is torch's CPU. The size of the chunks comes
// with each call.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace longrope {

template <typename F>
void on_device_of(const at::Tensor& like, const F& f) {
  (void)like;
  f(static_cast<void*>(nullptr));
}

}  // namespace longrope

#include "bindings/perplexity_chunks.h"

namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> linear_nll(const Tensor& hidden, const Tensor& weight,
                                      const Tensor& targets, int64_t ignore_index,
                                      std::optional<double> softcap, int64_t rows,
                                      int64_t columns) {
  return longrope::linear_nll_by_chunks(hidden, weight, targets, ignore_index, softcap,
                                        {rows, columns});
}

std::tuple<Tensor, Tensor> linear_nll_backward(const Tensor& grad_nll, const Tensor& hidden,
                                               const Tensor& weight, const Tensor& targets,
                                               const Tensor& stats, int64_t ignore_index,
                                               std::optional<double> softcap, bool need_hidden,
                                               bool need_weight, int64_t rows, int64_t columns) {
  return longrope::linear_nll_backward_by_chunks(grad_nll, hidden, weight, targets, stats,
                                                 ignore_index, softcap, need_hidden, need_weight,
                                                 {rows, columns});
}

std::tuple<Tensor, Tensor> linear_nll_with_gradient(const Tensor& hidden, const Tensor& weight,
                                                    const Tensor& targets, int64_t ignore_index,
                                                    std::optional<double> softcap, int64_t rows,
                                                    int64_t columns) {
  return longrope::linear_nll_with_gradient_by_chunks(hidden, weight, targets, ignore_index,
                                                      softcap, {rows, columns});
}

Tensor linear_nll_scale(const Tensor& grad_nll, const Tensor& gradient, const Tensor& targets,
                        int64_t ignore_index, int64_t rows, int64_t columns) {
  (void)rows, (void)columns;  // it has no chunks
  return longrope::linear_nll_scaled(grad_nll, gradient, targets, ignore_index);
}

}  // namespace

TORCH_LIBRARY(longrope_emulated, m) {
  m.def(
      "linear_nll(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float? softcap, "
      "int rows, int columns) -> (Tensor, Tensor)",
      &linear_nll);
  m.def(
      "linear_nll_backward(Tensor grad_nll, Tensor hidden, Tensor weight, Tensor targets, Tensor "
      "stats, int ignore_index, float? softcap, bool need_hidden, bool need_weight, int rows, int "
      "columns) -> (Tensor, Tensor)",
      &linear_nll_backward);
  m.def(
      "linear_nll_with_gradient(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
      "float? softcap, int rows, int columns) -> (Tensor, Tensor)",
      &linear_nll_with_gradient);
  m.def(
      "linear_nll_scale(Tensor grad_nll, Tensor gradient, Tensor targets, int ignore_index, int "
      "rows, int columns) -> Tensor",
      &linear_nll_scale);
}
