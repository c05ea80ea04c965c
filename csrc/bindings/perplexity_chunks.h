// linear_nll and its gradients on CUDA: the loops over chunks of rows and of the vocabulary, and
// the matrix products (cuBLAS, as torch has it). Nothing here waits for the device.
//
// Whoever includes this declares on_device_of first: bindings/cuda.h, or the tests, which run these
// functions over the emulated kernels (tests/emulation/perplexity_host.cpp).
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings/perplexity_arguments.h"

namespace longrope {

// Rows and columns of the logits that exist at a time: 4096 x 8192 floats are 128 MiB, their
// exponentials or gradient in 16 bits 64 MiB. Measured on an H100 (bench_perplexity.py --chunk):
// the sums of a gradient in float32 are read and written once for every chunk, so wide chunks gain
// more than logits that stay in the second-level cache; 8192 x 8192 would be some 4% faster for
// twice the memory, 4096 x 1024 takes a third more time with a frozen head.
struct NllChunks {
  int64_t rows = 4096, columns = 8192;

  // For a vocabulary that is smaller; rows of logits stay aligned.
  NllChunks within(int64_t vocab) const {
    return {rows, std::min(columns, (std::max<int64_t>(vocab, 1) + 7) / 8 * 8)};
  }
};

// Those in use, which benchmarks change.
inline NllChunks& nll_chunks() {
  static NllChunks chunks;
  return chunks;
}

namespace perplexity_bindings {

// out = a b, or += a b where `add`; out may be float32 where a and b have 16 bits.
inline void multiply(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const bool same = out.scalar_type() == a.scalar_type();
  if (add) {
    same ? at::addmm_out(out, out, a, b) : at::addmm_out(out, out, a, b, out.scalar_type());
  } else {
    same ? at::mm_out(out, a, b) : at::mm_out(out, a, b, out.scalar_type());
  }
}

// Calls f(chunk, row, stream) for every chunk with its logits, `row` its first one; the vocabulary
// runs fastest.
template <typename F>
void for_chunks(const LinearNllParams& p, NllChunks size, const Tensor& hidden,
                const Tensor& weight, const F& f) {
  const Tensor room =
      at::empty({std::min(p.rows, size.rows), size.columns}, hidden.options().dtype(at::kFloat));
  on_device_of(hidden, [&](void* stream) {
    for (int64_t row = 0; row < p.rows; row += size.rows) {
      const int64_t height = std::min(size.rows, p.rows - row);
      // Once even for an empty vocabulary: the first and last chunk, of no columns.
      for (int64_t first = 0; first == 0 || first < p.vocab; first += size.columns) {
        const int64_t width = std::min(size.columns, p.vocab - first);
        if (width > 0) {
          multiply(room.narrow(0, 0, height).narrow(1, 0, width), hidden.narrow(0, row, height),
                   weight.narrow(0, first, width).t(), false);
        }
        const LogitsChunk chunk{room.const_data_ptr<float>(),
                                size.columns,
                                height,
                                first,
                                width,
                                p.vocab,
                                p.targets + row,
                                p.ignore_index,
                                p.softcap};
        f(chunk, row, stream);
      }
    }
  });
}

}  // namespace perplexity_bindings

// longrope::linear_nll for tensors on a CUDA device.
inline std::tuple<at::Tensor, at::Tensor> linear_nll_by_chunks(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    int64_t ignore_index, std::optional<double> softcap, NllChunks size) {
  const at::Tensor held = targets.contiguous();
  const LinearNllParams p =
      perplexity_bindings::params_for(hidden, weight, held, ignore_index, softcap);
  size = size.within(p.vocab);
  const auto wide = hidden.options().dtype(at::kFloat);
  at::Tensor nll = at::empty({p.rows}, wide), stats = at::empty({2, p.rows}, wide);
  const at::Tensor target_logit = at::empty({p.rows}, wide);
  const auto reduce = [&](const LogitsChunk& chunk, int64_t row, void* stream) {
    float* const largest = stats.mutable_data_ptr<float>() + row;
    linear_nll_chunk_cuda({chunk, target_logit.mutable_data_ptr<float>() + row, largest,
                           largest + p.rows, nll.mutable_data_ptr<float>() + row},
                          stream);
  };
  perplexity_bindings::for_chunks(p, size, hidden, weight, reduce);
  return {nll, stats};
}

// longrope::linear_nll_with_gradient for tensors on a CUDA device.
inline std::tuple<at::Tensor, at::Tensor> linear_nll_with_gradient_by_chunks(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    int64_t ignore_index, std::optional<double> softcap, NllChunks size) {
  using perplexity_bindings::multiply;
  const at::Tensor held = targets.contiguous();
  const LinearNllParams p =
      perplexity_bindings::params_for(hidden, weight, held, ignore_index, softcap);
  size = size.within(p.vocab);
  const auto wide = hidden.options().dtype(at::kFloat);
  const int64_t height = std::min(p.rows, size.rows);
  const at::Tensor nll = at::empty({p.rows}, wide), state = at::empty({3, height}, wide);
  const at::Tensor gradient = at::empty(hidden.sizes(), hidden.options());
  const at::Tensor sums = at::empty({height, p.embed}, wide);
  const at::Tensor room = at::empty({height, size.columns}, hidden.options());
  float* const largest = state.mutable_data_ptr<float>();
  const auto add = [&](const LogitsChunk& chunk, int64_t row, void* stream) {
    float* const others = largest + height;
    float* const target_logit = others + height;
    linear_nll_gradient_chunk_cuda(
        {chunk, largest, others, target_logit, p.dtype, room.mutable_data_ptr(), size.columns,
         sums.mutable_data_ptr<float>(), p.embed},
        stream);
    if (chunk.columns > 0) {
      multiply(sums.narrow(0, 0, chunk.rows),
               room.narrow(0, 0, chunk.rows).narrow(1, 0, chunk.columns),
               weight.narrow(0, chunk.first, chunk.columns), chunk.first > 0);
    }
    if (chunk.first + chunk.columns < p.vocab) return;
    linear_nll_gradient_cuda(
        {chunk.targets, chunk.rows, p.embed, p.vocab, p.ignore_index, p.softcap, p.dtype, p.weight,
         largest, others, target_logit, sums.const_data_ptr<float>(),
         nll.mutable_data_ptr<float>() + row,
         static_cast<char*>(gradient.mutable_data_ptr()) + row * p.embed * hidden.element_size()},
        stream);
  };
  perplexity_bindings::for_chunks(p, size, hidden, weight, add);
  return {nll, gradient};
}

// longrope::linear_nll_scale for tensors on a CUDA device.
inline at::Tensor linear_nll_scaled(const at::Tensor& grad_nll, const at::Tensor& gradient,
                                    const at::Tensor& targets, int64_t ignore_index) {
  const perplexity_bindings::Scaling scaling(grad_nll, gradient, targets, ignore_index);
  on_device_of(gradient, [&](void* stream) { linear_nll_scale_cuda(scaling.params, stream); });
  return scaling.out;
}

// longrope::linear_nll_backward for tensors on a CUDA device.
inline std::tuple<at::Tensor, at::Tensor> linear_nll_backward_by_chunks(
    const at::Tensor& grad_nll, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& targets, const at::Tensor& stats, int64_t ignore_index,
    std::optional<double> softcap, bool need_hidden, bool need_weight, NllChunks size) {
  using perplexity_bindings::multiply;
  const at::Tensor held = targets.contiguous();
  const LinearNllParams p =
      perplexity_bindings::params_for(hidden, weight, held, ignore_index, softcap);
  size = size.within(p.vocab);
  perplexity_bindings::check("grad_nll", grad_nll, at::kFloat, {p.rows}, hidden);
  perplexity_bindings::check("stats", stats, at::kFloat, {2, p.rows}, hidden);
  const at::Tensor grad = grad_nll.contiguous(), saved = stats.contiguous();
  const at::Tensor ignored = held.eq(ignore_index).unsqueeze(1);
  // An ignored row's gradient of logits is 0, and 0 times what its hidden state holds may be NaN.
  const at::Tensor scored = need_weight ? hidden.masked_fill(ignored, 0.0) : hidden;
  const auto wide = hidden.options().dtype(at::kFloat);
  // Sums over chunks stay in float32: over the vocabulary for hidden, over the rows, if they are
  // more than one chunk, for weight.
  const auto of_weight = p.rows > size.rows ? wide : weight.options();
  at::Tensor grad_hidden = need_hidden ? at::zeros(hidden.sizes(), wide) : at::empty({0}, wide);
  at::Tensor grad_weight =
      need_weight ? at::zeros(weight.sizes(), of_weight) : at::empty({0}, wide);
  const at::Tensor room = at::empty({std::min(p.rows, size.rows), size.columns}, hidden.options());
  const auto add = [&](const LogitsChunk& chunk, int64_t row, void* stream) {
    if (chunk.columns == 0) return;
    const float* const largest = saved.const_data_ptr<float>() + row;
    linear_nll_backward_chunk_cuda(
        {chunk, largest, largest + p.rows, grad.const_data_ptr<float>() + row, p.dtype,
         room.mutable_data_ptr(), size.columns},
        stream);
    const at::Tensor grad_logits = room.narrow(0, 0, chunk.rows).narrow(1, 0, chunk.columns);
    if (need_hidden) {
      multiply(grad_hidden.narrow(0, row, chunk.rows), grad_logits,
               weight.narrow(0, chunk.first, chunk.columns), chunk.first > 0);
    }
    if (need_weight) {
      multiply(grad_weight.narrow(0, chunk.first, chunk.columns), grad_logits.t(),
               scored.narrow(0, row, chunk.rows), row > 0);
    }
  };
  perplexity_bindings::for_chunks(p, size, hidden, weight, add);
  if (need_hidden && p.vocab > 0) grad_hidden.masked_fill_(ignored, 0.0);
  return {grad_hidden.to(hidden.scalar_type()), grad_weight.to(weight.scalar_type())};
}

}  // namespace longrope
