// longrope::rope, rope_, rope_grad, rerotate: checks, allocation, threads. See csrc/rope/rope.h.
#include "rope/rope.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "bindings/check.h"
#include "bindings/cuda.h"
#include "bindings/huge_pages.h"
#include "bindings/overlap.h"

namespace longrope {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kDouble:
      TORCH_CHECK_VALUE(q.is_cpu(), "q: expected float32, bfloat16 or float16 on ", q.device(),
                        ", got ", describe(q));
      return DType::kFloat64;
    default:
      TORCH_CHECK_VALUE(false, "q: expected float32, bfloat16, float16 or float64, got ",
                        describe(q));
  }
}

RopeTensor view_of(const Tensor& t) {
  return {t.data_ptr(), t.size(1), t.stride(0), t.stride(1), t.stride(2)};
}

// A fresh tensor in the memory order of `like`: [B, N, H, D] where heads lie closer than tokens,
// [B, H, N, D] otherwise. The fake kernels follow the same rule.
Tensor fresh(const Tensor& like) {
  const auto s = like.sizes();
  const bool token_major = like.stride(1) < like.stride(2);
  const Tensor memory = token_major ? at::empty({s[0], s[2], s[1], s[3]}, like.options())
                                    : at::empty(s, like.options());
  prefer_huge_pages(memory);
  return token_major ? memory.transpose(1, 2) : memory;
}

void check_heads(const char* name, const Tensor& t, const Tensor& q) {
  const std::string expected = "[B, heads, N, D]";
  LONGROPE_EXPECT(t.dim() == 4, name, expected, describe(t));
  LONGROPE_EXPECT(t.device() == q.device(), name, q.device(), t.device());
  LONGROPE_EXPECT(t.scalar_type() == q.scalar_type() && t.size(0) == q.size(0) &&
                      t.size(2) == q.size(2) && t.size(3) == q.size(3),
                  name, "the dtype, B, N and D of " + describe(q), describe(t));
  LONGROPE_EXPECT(t.stride(3) == 1 || t.numel() == 0, name, "stride 1 in the last dimension",
                  t.strides());
}

// Contiguous, and kept alive for as long as the parameters point to them.
struct Arguments {
  RopeParams params{};
  std::vector<Tensor> held;

  // Also checks: frequencies must be finite, since their fixed point form could not say NaN.
  RopeFrequencies frequencies(const char* name, const Tensor& inv_freq, const char* base_name,
                              const OptionalTensor& base_inv_freq, int64_t start_tokens,
                              const OptionalTensor& start_tokens_rows, bool first) {
    const auto rows = [&](const char* what, const Tensor& t) {
      const int64_t pairs = first && what == name ? t.dim() > 0 ? t.size(-1) : 0 : params.pairs;
      std::ostringstream expected;
      expected << "float64 [" << pairs << "] or [" << params.batch << ", " << pairs << "]";
      LONGROPE_EXPECT(t.scalar_type() == at::kDouble && (t.dim() == 1 || t.dim() == 2) &&
                          t.size(-1) == pairs && (t.dim() == 1 || t.size(0) == params.batch),
                      what, expected.str(), describe(t));
      check_device(what, t);
      params.pairs = pairs;
      TORCH_CHECK_VALUE(pairs >= 1 && 2 * pairs <= params.head_dim, what, ": expected 1 to ",
                        params.head_dim / 2, " frequencies for head_dim ", params.head_dim,
                        ", got ", pairs);
      held.push_back(t.contiguous());
      const double* data = held.back().const_data_ptr<double>();
      if (t.is_cpu()) {
        for (int64_t i = 0; i < t.numel(); ++i) {
          LONGROPE_EXPECT(std::isfinite(data[i]), what, "finite frequencies",
                          (std::isnan(data[i]) ? "NaN" : "infinity"));
        }
      }
      return std::make_tuple(data, t.dim() == 2 ? pairs : int64_t{0});
    };
    RopeFrequencies f{};
    std::tie(f.inv_freq, f.inv_freq_stride) = rows(name, inv_freq);
    LONGROPE_EXPECT(start_tokens >= 0, "start_tokens", "0 or more", start_tokens);
    f.start_tokens = start_tokens;
    if (start_tokens_rows) f.start_tokens_rows = start_rows(*start_tokens_rows);
    if (start_tokens > 0 || start_tokens_rows) {
      TORCH_CHECK_VALUE(base_inv_freq, base_name, ": required with start_tokens");
    }
    if (base_inv_freq) {
      std::tie(f.base_inv_freq, f.base_inv_freq_stride) = rows(base_name, *base_inv_freq);
    }
    return f;
  }

  const int64_t* start_rows(const Tensor& t) {
    std::ostringstream expected;
    expected << "an int or int64 [" << params.batch << "]";
    LONGROPE_EXPECT(t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == params.batch,
                    "start_tokens", expected.str(), describe(t));
    check_device("start_tokens", t);
    held.push_back(t.contiguous());
    const int64_t* data = held.back().const_data_ptr<int64_t>();
    for (int64_t b = 0; t.is_cpu() && b < params.batch; ++b) {
      LONGROPE_EXPECT(data[b] >= 0, "start_tokens", "0 or more", data[b]);
    }
    return data;
  }

  void factor(double value, const OptionalTensor& rows) {
    params.attention_factor = value;
    TORCH_CHECK_VALUE(std::isfinite(value), "attention_factor: expected a finite number, got ",
                      value);
    if (!rows) return;
    std::ostringstream expected;
    expected << "a number, or float64 [] or [" << params.batch << "]";
    LONGROPE_EXPECT(rows->scalar_type() == at::kDouble &&
                        (rows->dim() == 0 || (rows->dim() == 1 && rows->size(0) == params.batch)),
                    "attention_factor", expected.str(), describe(*rows));
    check_device("attention_factor", *rows);
    held.push_back(rows->expand({params.batch}).contiguous());
    params.attention_factor_rows = held.back().const_data_ptr<double>();
    for (int64_t b = 0; rows->is_cpu() && b < params.batch; ++b) {
      TORCH_CHECK_VALUE(std::isfinite(params.attention_factor_rows[b]),
                        "attention_factor: expected finite numbers, got ",
                        params.attention_factor_rows[b]);
    }
  }

  void positions(const Tensor& t) {
    std::ostringstream expected;
    expected << "int64 [" << params.tokens << "] or [" << params.batch << ", " << params.tokens
             << "]";
    LONGROPE_EXPECT(t.scalar_type() == at::kLong && (t.dim() == 1 || t.dim() == 2) &&
                        t.size(-1) == params.tokens && (t.dim() == 1 || t.size(0) == params.batch),
                    "positions", expected.str(), describe(t));
    check_device("positions", t);
    held.push_back(t);
    params.positions = t.const_data_ptr<int64_t>();
    params.positions_batch_stride = t.dim() == 2 ? t.stride(0) : 0;
    params.positions_token_stride = t.stride(-1);
  }

  // The shapes and the dtype of q and k; outputs are set by the caller.
  void heads(const char* q_name, const Tensor& q, const char* k_name, const Tensor& k) {
    check_heads(q_name, q, q);
    check_heads(k_name, k, q);
    device_ = q.device();
    params.dtype = dtype_of(q);
    params.batch = q.size(0);
    params.tokens = q.size(2);
    params.head_dim = q.size(3);
    params.q = view_of(q);
    params.k = view_of(k);
  }

 private:
  void check_device(const char* name, const Tensor& t) const {
    LONGROPE_EXPECT(t.device() == device_, name, "device " + device_.str(), t.device());
  }

  at::Device device_ = at::kCPU;
};

// Items of work per thread at least: about 32k elements, some ten microseconds.
int64_t grain(const RopeParams& p, int64_t items) {
  const int64_t elements = p.batch * p.tokens * (p.q.heads + p.k.heads) * p.head_dim;
  return std::max<int64_t>(1, 32768 * items / std::max<int64_t>(1, elements));
}

// On the device of `like`.
void run(const RopeParams& params, const Tensor& like) {
#ifdef LONGROPE_CUDA
  if (like.is_cuda()) {
    on_device_of(like, [&](void* stream) { rope_cuda(params, stream); });
    return;
  }
#endif
  const int64_t items = params.batch * rope_blocks(params);
  at::parallel_for(0, items, grain(params, items),
                   [&](int64_t begin, int64_t end) { rope_cpu(params, begin, end); });
}

// A sum per block of tokens, [batch, blocks, 2 * pairs + 1]; to be added up in one order, so that
// the result is the same for any number of threads.
Tensor run_grad(RopeGradParams& params, const Tensor& like) {
  const RopeParams& p = params.forward;
  const auto allocate = [&](int64_t blocks) {
    Tensor partial =
        at::empty({p.batch, blocks, 2 * p.pairs + 1}, like.options().dtype(at::kDouble));
    params.partial = partial.mutable_data_ptr<double>();
    return partial;
  };
#ifdef LONGROPE_CUDA
  if (like.is_cuda()) {
    Tensor partial;
    on_device_of(like, [&](void* stream) {
      partial = allocate(rope_grad_cuda_blocks(params));
      rope_grad_cuda(params, stream);
    });
    return partial;
  }
#endif
  const int64_t blocks = rope_blocks(p), items = p.batch * blocks;
  Tensor partial = allocate(blocks);
  at::parallel_for(0, items, grain(p, items),
                   [&](int64_t begin, int64_t end) { rope_grad_cpu(params, begin, end); });
  return partial;
}

void check_writable(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(!may_overlap_itself(t), name,
                    ": expected memory without overlap to write to, got strides ", t.strides(),
                    " for ", describe(t));
}

Arguments rope_arguments(const Tensor& q, const Tensor& k, const Tensor& positions,
                         const Tensor& inv_freq, const OptionalTensor& base_inv_freq,
                         int64_t start_tokens, const OptionalTensor& start_tokens_rows,
                         double attention_factor, const OptionalTensor& attention_factor_rows,
                         bool interleaved, bool inverse) {
  Arguments arguments;
  RopeParams& p = arguments.params;
  arguments.heads("q", q, "k", k);
  arguments.positions(positions);
  (inverse ? p.undo : p.turn) = arguments.frequencies(
      "inv_freq", inv_freq, "base_inv_freq", base_inv_freq, start_tokens, start_tokens_rows, true);
  arguments.factor(attention_factor, attention_factor_rows);
  p.interleaved = interleaved;
  return arguments;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions,
                                const Tensor& inv_freq, const OptionalTensor& base_inv_freq,
                                int64_t start_tokens, const OptionalTensor& start_tokens_rows,
                                double attention_factor,
                                const OptionalTensor& attention_factor_rows, bool interleaved,
                                bool inverse) {
  Arguments arguments =
      rope_arguments(q, k, positions, inv_freq, base_inv_freq, start_tokens, start_tokens_rows,
                     attention_factor, attention_factor_rows, interleaved, inverse);
  Tensor q_out = fresh(q), k_out = fresh(k);
  arguments.params.q_out = view_of(q_out);
  arguments.params.k_out = view_of(k_out);
  run(arguments.params, q);
  return {q_out, k_out};
}

void rope_in_place(const Tensor& q, const Tensor& k, const Tensor& positions,
                   const Tensor& inv_freq, const OptionalTensor& base_inv_freq,
                   int64_t start_tokens, const OptionalTensor& start_tokens_rows,
                   double attention_factor, const OptionalTensor& attention_factor_rows,
                   bool interleaved) {
  Arguments arguments =
      rope_arguments(q, k, positions, inv_freq, base_inv_freq, start_tokens, start_tokens_rows,
                     attention_factor, attention_factor_rows, interleaved, false);
  check_writable("q", q);
  check_writable("k", k);
  TORCH_CHECK_VALUE(!may_overlap(q, k), "k: expected memory apart from q's, got an overlap");
  arguments.params.q_out = arguments.params.q;
  arguments.params.k_out = arguments.params.k;
  run(arguments.params, q);
}

std::tuple<Tensor, Tensor, Tensor> rope_grad(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k,
    const Tensor& positions, const Tensor& inv_freq, const OptionalTensor& base_inv_freq,
    int64_t start_tokens, const OptionalTensor& start_tokens_rows, double attention_factor,
    const OptionalTensor& attention_factor_rows, bool interleaved, bool inverse) {
  Arguments arguments =
      rope_arguments(q, k, positions, inv_freq, base_inv_freq, start_tokens, start_tokens_rows,
                     attention_factor, attention_factor_rows, interleaved, inverse);
  check_heads("grad_q", grad_q, q);
  check_heads("grad_k", grad_k, k);
  LONGROPE_EXPECT(grad_q.size(1) == q.size(1), "grad_q", "the shape of " + describe(q),
                  describe(grad_q));
  LONGROPE_EXPECT(grad_k.size(1) == k.size(1), "grad_k", "the shape of " + describe(k),
                  describe(grad_k));
  RopeGradParams params{arguments.params, view_of(grad_q), view_of(grad_k), nullptr};
  const RopeParams& p = params.forward;
  const Tensor rows = run_grad(params, q).sum(1);
  return {rows.slice(1, 0, p.pairs).clone(), rows.slice(1, p.pairs, 2 * p.pairs).clone(),
          rows.select(1, 2 * p.pairs).clone()};
}

void rerotate_to(const Tensor& k, const Tensor& positions, const Tensor& from_inv_freq,
                 const OptionalTensor& from_base_inv_freq, int64_t from_start_tokens,
                 const Tensor& to_inv_freq, const OptionalTensor& to_base_inv_freq,
                 int64_t to_start_tokens, double attention_factor, bool interleaved,
                 const Tensor& out) {
  Arguments arguments;
  RopeParams& p = arguments.params;
  arguments.heads("k", k, "out", out);
  LONGROPE_EXPECT(out.size(1) == k.size(1), "out", "the shape of " + describe(k), describe(out));
  arguments.positions(positions);
  p.undo = arguments.frequencies("from_inv_freq", from_inv_freq, "from_base_inv_freq",
                                 from_base_inv_freq, from_start_tokens, std::nullopt, true);
  p.turn = arguments.frequencies("to_inv_freq", to_inv_freq, "to_base_inv_freq", to_base_inv_freq,
                                 to_start_tokens, std::nullopt, false);
  arguments.factor(attention_factor, std::nullopt);
  p.interleaved = interleaved;
  check_writable("out", out);
  const bool in_place = k.data_ptr() == out.data_ptr() && k.strides() == out.strides();
  TORCH_CHECK_VALUE(in_place || !may_overlap(k, out),
                    "out: expected k itself or memory apart from it, got an overlap");
  p.q_out = p.k;
  p.k.heads = p.k_out.heads = 0;
  run(p, k);
}

Tensor rerotate(const Tensor& k, const Tensor& positions, const Tensor& from_inv_freq,
                const OptionalTensor& from_base_inv_freq, int64_t from_start_tokens,
                const Tensor& to_inv_freq, const OptionalTensor& to_base_inv_freq,
                int64_t to_start_tokens, double attention_factor, bool interleaved) {
  check_heads("k", k, k);
  Tensor out = fresh(k);
  rerotate_to(k, positions, from_inv_freq, from_base_inv_freq, from_start_tokens, to_inv_freq,
              to_base_inv_freq, to_start_tokens, attention_factor, interleaved, out);
  return out;
}

void rerotate_in_place(const Tensor& k, const Tensor& positions, const Tensor& from_inv_freq,
                       const OptionalTensor& from_base_inv_freq, int64_t from_start_tokens,
                       const Tensor& to_inv_freq, const OptionalTensor& to_base_inv_freq,
                       int64_t to_start_tokens, double attention_factor, bool interleaved) {
  rerotate_to(k, positions, from_inv_freq, from_base_inv_freq, from_start_tokens, to_inv_freq,
              to_base_inv_freq, to_start_tokens, attention_factor, interleaved, k);
}

void implement(torch::Library& m) {
  m.impl("rope", &rope);
  m.impl("rope_", &rope_in_place);
  m.impl("rope_grad", &rope_grad);
  m.impl("rerotate", &rerotate);
  m.impl("rerotate_out", &rerotate_to);
  m.impl("rerotate_", &rerotate_in_place);
}

}  // namespace

TORCH_LIBRARY_IMPL(longrope, CPU, m) { implement(m); }
#ifdef LONGROPE_CUDA
TORCH_LIBRARY_IMPL(longrope, CUDA, m) { implement(m); }
#endif

}  // namespace longrope
