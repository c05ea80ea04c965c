// linear_nll and its backward on CUDA: the loops over chunks of rows and of the vocabulary, and the
// matrix products (cuBLAS, as torch has it). Nothing here waits for the device.
#pragma once

#include "bindings/cuda.h"

#ifdef LONGROPE_CUDA

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>

#include "perplexity/perplexity.h"

namespace longrope {

// A chunk of logits is 4096 x 2048 floats at most, 32 MiB: it stays in the second-level cache of a
// data-centre GPU (40 MiB on A100, 50 MiB on H100) between the product and the kernel.
constexpr int64_t kChunkRows = 4096;
constexpr int64_t kChunkColumns = 2048;

// out = a b, or += a b where `add`; out may be float32 where a and b have 16 bits.
inline void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
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
void for_chunks(const LinearNllParams& p, const at::Tensor& hidden, const at::Tensor& weight,
                const F& f) {
  const at::Tensor room =
      at::empty({std::min(p.rows, kChunkRows), kChunkColumns}, hidden.options().dtype(at::kFloat));
  on_device_of(hidden, [&](void* stream) {
    for (int64_t row = 0; row < p.rows; row += kChunkRows) {
      const int64_t height = std::min(kChunkRows, p.rows - row);
      // Once even for an empty vocabulary: the first and last chunk, of no columns.
      for (int64_t first = 0; first == 0 || first < p.vocab; first += kChunkColumns) {
        const int64_t width = std::min(kChunkColumns, p.vocab - first);
        if (width > 0) {
          multiply(room.narrow(0, 0, height).narrow(1, 0, width), hidden.narrow(0, row, height),
                   weight.narrow(0, first, width).t(), false);
        }
        const LogitsChunk chunk{room.const_data_ptr<float>(),
                                kChunkColumns,
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

inline void linear_nll_by_chunks(const LinearNllParams& p, const at::Tensor& hidden,
                                 const at::Tensor& weight) {
  const at::Tensor target_logit = at::empty({p.rows}, hidden.options().dtype(at::kFloat));
  for_chunks(p, hidden, weight, [&](const LogitsChunk& chunk, int64_t row, void* stream) {
    float* const largest = static_cast<float*>(p.stats) + row;
    linear_nll_chunk_cuda({chunk, target_logit.mutable_data_ptr<float>() + row, largest,
                           largest + p.rows, static_cast<float*>(p.nll) + row},
                          stream);
  });
}

// ignored: bool [rows, 1].
inline std::tuple<at::Tensor, at::Tensor> linear_nll_backward_by_chunks(
    const LinearNllParams& p, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& ignored, bool need_hidden, bool need_weight) {
  // An ignored row's gradient of logits is 0, and 0 times what its hidden state holds may be NaN.
  const at::Tensor scored = need_weight ? hidden.masked_fill(ignored, 0.0) : hidden;
  const auto wide = hidden.options().dtype(at::kFloat);
  // Sums over chunks stay in float32: over the vocabulary for hidden, over the rows, if they are
  // more than one chunk, for weight.
  const auto of_weight = p.rows > kChunkRows ? wide : weight.options();
  at::Tensor grad_hidden = need_hidden ? at::zeros(hidden.sizes(), wide) : at::empty({0}, wide);
  at::Tensor grad_weight =
      need_weight ? at::zeros(weight.sizes(), of_weight) : at::empty({0}, wide);
  const at::Tensor room =
      at::empty({std::min(p.rows, kChunkRows), kChunkColumns}, hidden.options());
  for_chunks(p, hidden, weight, [&](const LogitsChunk& chunk, int64_t row, void* stream) {
    if (chunk.columns == 0) return;
    const float* const largest = static_cast<const float*>(p.stats) + row;
    linear_nll_backward_chunk_cuda(
        {chunk, largest, largest + p.rows, static_cast<const float*>(p.grad_nll) + row, p.dtype,
         room.mutable_data_ptr(), kChunkColumns},
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
  });
  if (need_hidden && p.vocab > 0) grad_hidden.masked_fill_(ignored, 0.0);
  return {grad_hidden.to(hidden.scalar_type()), grad_weight.to(weight.scalar_type())};
}

}  // namespace longrope

#endif
