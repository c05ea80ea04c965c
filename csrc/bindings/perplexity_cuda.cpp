// CUDA implementations of linear_nll, its backward and candidate_sums: checks, the loop over chunks
// of rows and of the vocabulary, and the matrix products (cuBLAS, as torch has it). See
// csrc/perplexity/perplexity.h. Nothing here waits for the device.
#ifdef LONGROPE_CUDA

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "bindings/check.h"
#include "bindings/cuda.h"
#include "perplexity/perplexity.h"

namespace longrope {
namespace {

using at::Tensor;

// A chunk of logits is 4096 x 2048 floats at most, 32 MiB: it stays in the second-level cache of a
// data-centre GPU (40 MiB on A100, 50 MiB on H100) between the product and the kernel.
constexpr int64_t kChunkRows = 4096;
constexpr int64_t kChunkColumns = 2048;

DType dtype_of(const Tensor& hidden) {
  switch (hidden.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      LONGROPE_EXPECT(false, "hidden", "float32, bfloat16 or float16 [T, E] on a CUDA device",
                      describe(hidden));
  }
}

std::string on_device(const Tensor& tensor) {
  return describe(tensor) + " on " + tensor.device().str();
}

// `what`, for example "targets": of this dtype and shape, on the device of `like`.
void check(const char* what, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes,
           const Tensor& like) {
  std::ostringstream expected;
  expected << toString(dtype) << " " << sizes << " on " << like.device();
  LONGROPE_EXPECT(
      tensor.scalar_type() == dtype && tensor.sizes() == sizes && tensor.device() == like.device(),
      what, expected.str(), on_device(tensor));
}

void check_arguments(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                     std::optional<double> softcap) {
  LONGROPE_EXPECT(hidden.dim() == 2, "hidden", "[T, E]", on_device(hidden));
  dtype_of(hidden);
  LONGROPE_EXPECT(
      weight.dim() == 2 && weight.size(1) == hidden.size(1) &&
          weight.scalar_type() == hidden.scalar_type() && weight.device() == hidden.device(),
      "weight", "[V, E] of hidden's E, dtype and device, hidden is " + on_device(hidden),
      on_device(weight));
  check("targets", targets, at::kLong, {hidden.size(0)}, hidden);
  LONGROPE_EXPECT(!softcap || (std::isfinite(*softcap) && *softcap > 0.0), "softcap",
                  "None or a positive number", softcap.value_or(0.0));
}

// out = a b, or += a b where `add`; out may be float32 where a and b have 16 bits.
void multiply(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const bool same = out.scalar_type() == a.scalar_type();
  if (add) {
    same ? at::addmm_out(out, out, a, b) : at::addmm_out(out, out, a, b, out.scalar_type());
  } else {
    same ? at::mm_out(out, a, b) : at::mm_out(out, a, b, out.scalar_type());
  }
}

struct Chunk {
  int64_t row, rows;       // rows [row, row + rows)
  int64_t first, columns;  // vocabulary [first, first + columns)
  Tensor logits;           // [rows, columns]
  LogitsChunk view;
};

// Calls f(chunk) for every chunk with its logits; the vocabulary runs fastest.
template <typename F>
void for_chunks(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                int64_t ignore_index, std::optional<double> softcap, const F& f) {
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  const Tensor room =
      at::empty({std::min(rows, kChunkRows), kChunkColumns}, hidden.options().dtype(at::kFloat));
  for (int64_t row = 0; row < rows; row += kChunkRows) {
    const int64_t height = std::min(kChunkRows, rows - row);
    // Once even for an empty vocabulary: the first and last chunk, of no columns.
    for (int64_t first = 0; first == 0 || first < vocab; first += kChunkColumns) {
      const int64_t width = std::min(kChunkColumns, vocab - first);
      Chunk chunk{row, height, first, width, room.narrow(0, 0, height).narrow(1, 0, width), {}};
      if (width > 0) {
        multiply(chunk.logits, hidden.narrow(0, row, height), weight.narrow(0, first, width).t(),
                 false);
      }
      chunk.view = {room.const_data_ptr<float>(),
                    kChunkColumns,
                    height,
                    first,
                    width,
                    vocab,
                    targets.const_data_ptr<int64_t>() + row,
                    ignore_index,
                    softcap.value_or(0.0)};
      f(chunk);
    }
  }
}

std::tuple<Tensor, Tensor> linear_nll_cuda(const Tensor& hidden, const Tensor& weight,
                                           const Tensor& targets, int64_t ignore_index,
                                           std::optional<double> softcap) {
  check_arguments(hidden, weight, targets, softcap);
  const int64_t rows = hidden.size(0);
  const auto options = hidden.options().dtype(at::kFloat);
  Tensor nll = at::empty({rows}, options), stats = at::empty({2, rows}, options);
  const Tensor target_logit = at::empty({rows}, options), held = targets.contiguous();
  on_device_of(hidden, [&](void* stream) {
    for_chunks(hidden, weight, held, ignore_index, softcap, [&](const Chunk& chunk) {
      float* const largest = stats.mutable_data_ptr<float>() + chunk.row;
      linear_nll_chunk_cuda({chunk.view, target_logit.mutable_data_ptr<float>() + chunk.row,
                             largest, largest + rows, nll.mutable_data_ptr<float>() + chunk.row},
                            stream);
    });
  });
  return {nll, stats};
}

std::tuple<Tensor, Tensor> linear_nll_backward_cuda(const Tensor& grad_nll, const Tensor& hidden,
                                                    const Tensor& weight, const Tensor& targets,
                                                    const Tensor& stats, int64_t ignore_index,
                                                    std::optional<double> softcap, bool need_hidden,
                                                    bool need_weight) {
  check_arguments(hidden, weight, targets, softcap);
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  check("grad_nll", grad_nll, at::kFloat, {rows}, hidden);
  check("stats", stats, at::kFloat, {2, rows}, hidden);
  const Tensor grad = grad_nll.contiguous(), saved = stats.contiguous(),
               held = targets.contiguous();
  const Tensor ignored = held.eq(ignore_index).unsqueeze(1);
  // An ignored row's gradient of logits is 0, and 0 times what its hidden state holds may be NaN.
  const Tensor scored = need_weight ? hidden.masked_fill(ignored, 0.0) : hidden;
  const auto wide = hidden.options().dtype(at::kFloat);
  // Sums over chunks stay in float32: over the vocabulary for hidden, over the rows, if they are
  // more than one chunk, for weight.
  const auto of_weight = rows > kChunkRows ? wide : weight.options();
  Tensor grad_hidden = need_hidden ? at::zeros(hidden.sizes(), wide) : at::empty({0}, wide);
  Tensor grad_weight = need_weight ? at::zeros(weight.sizes(), of_weight) : at::empty({0}, wide);
  const Tensor room = at::empty({std::min(rows, kChunkRows), kChunkColumns}, hidden.options());
  on_device_of(hidden, [&](void* stream) {
    for_chunks(hidden, weight, held, ignore_index, softcap, [&](const Chunk& chunk) {
      if (chunk.columns == 0) return;
      const float* const largest = saved.const_data_ptr<float>() + chunk.row;
      linear_nll_grad_chunk_cuda(
          {chunk.view, largest, largest + rows, grad.const_data_ptr<float>() + chunk.row,
           dtype_of(hidden), room.mutable_data_ptr(), kChunkColumns},
          stream);
      const Tensor grad_logits = room.narrow(0, 0, chunk.rows).narrow(1, 0, chunk.columns);
      if (need_hidden) {
        multiply(grad_hidden.narrow(0, chunk.row, chunk.rows), grad_logits,
                 weight.narrow(0, chunk.first, chunk.columns), chunk.first > 0);
      }
      if (need_weight) {
        multiply(grad_weight.narrow(0, chunk.first, chunk.columns), grad_logits.t(),
                 scored.narrow(0, chunk.row, chunk.rows), chunk.row > 0);
      }
    });
  });
  if (need_hidden && vocab > 0) grad_hidden.masked_fill_(ignored, 0.0);
  return {grad_hidden.to(hidden.scalar_type()), grad_weight.to(weight.scalar_type())};
}

std::tuple<Tensor, Tensor> candidate_sums_on_cuda(const Tensor& nll, const Tensor& targets,
                                                  const Tensor& candidate, int64_t candidates,
                                                  int64_t ignore_index) {
  check("nll", nll, at::kFloat, {nll.numel()}, nll);
  check("targets", targets, at::kLong, nll.sizes(), nll);
  check("candidate", candidate, at::kLong, nll.sizes(), nll);
  LONGROPE_EXPECT(candidates >= 0, "candidates", "a count", candidates);
  Tensor sums = at::empty({candidates}, nll.options().dtype(at::kDouble));
  Tensor counts = at::empty({candidates}, targets.options());
  const Tensor values = nll.contiguous(), rows = targets.contiguous(),
               owner = candidate.contiguous();
  on_device_of(nll, [&](void* stream) {
    candidate_sums_cuda({values.const_data_ptr<float>(), rows.const_data_ptr<int64_t>(),
                         owner.const_data_ptr<int64_t>(), nll.size(0), candidates, ignore_index,
                         sums.mutable_data_ptr<double>(), counts.mutable_data_ptr<int64_t>()},
                        stream);
  });
  return {sums, counts};
}

}  // namespace
}  // namespace longrope

TORCH_LIBRARY_IMPL(longrope, CUDA, m) {
  m.impl("linear_nll", &longrope::linear_nll_cuda);
  m.impl("linear_nll_backward", &longrope::linear_nll_backward_cuda);
  m.impl("candidate_sums", &longrope::candidate_sums_on_cuda);
}

#endif  // LONGROPE_CUDA
