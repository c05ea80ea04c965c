// longrope::rope, rope_, rope_backward, rerotate, rerotate_rows_: allocation, threads of the CPU,
// streams of CUDA. See csrc/rope/rope.h; checks are in rope_arguments.h.
#include "rope/rope.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <tuple>

#include "bindings/cuda.h"
#include "bindings/overlap.h"
#include "bindings/rope_arguments.h"

namespace longrope {
namespace {

using namespace rope_bindings;

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

// A sum per block of tokens, [groups, batch, blocks, 2 * pairs + 1]; to be added up in one order,
// so that the result is the same for any number of threads.
Tensor run_grad(RopeBackwardParams& params, const Tensor& like) {
  const RopeParams& p = params.forward;
  const auto allocate = [&](int64_t blocks) {
    Tensor partial =
        at::empty({p.groups, p.batch, blocks, 2 * p.pairs + 1}, like.options().dtype(at::kDouble));
    params.partial = partial.mutable_data_ptr<double>();
    return partial;
  };
#ifdef LONGROPE_CUDA
  if (like.is_cuda()) {
    Tensor partial;
    on_device_of(like, [&](void* stream) {
      partial = allocate(rope_backward_cuda_blocks(params));
      rope_backward_cuda(params, stream);
    });
    return partial;
  }
#endif
  const int64_t blocks = rope_blocks(p), items = p.batch * blocks;
  Tensor partial = allocate(blocks);
  at::parallel_for(0, items, grain(p, items),
                   [&](int64_t begin, int64_t end) { rope_backward_cpu(params, begin, end); });
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

std::tuple<Tensor, Tensor, Tensor> rope_backward(
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
  RopeBackwardParams params{arguments.params, view_of(grad_q), view_of(grad_k), nullptr};
  const RopeParams& p = params.forward;
  const Tensor sums = run_grad(params, q).sum(2).transpose(0, 1);  // [batch, groups, ...]
  const Tensor rows = inv_freq.dim() == 3 ? sums : sums.select(1, 0);
  const Tensor base = sums.slice(2, p.pairs, 2 * p.pairs);
  const auto own = [](const Tensor& t) { return t.clone(at::MemoryFormat::Contiguous); };
  return {own(rows.slice(-1, 0, p.pairs)), p.groups == 1 ? own(base.select(1, 0)) : base.sum(1),
          own(rows.select(-1, 2 * p.pairs))};
}

void rerotate_to(const Tensor& k, const Tensor& positions, const Tensor& from_inv_freq,
                 const OptionalTensor& from_base_inv_freq, int64_t from_start_tokens,
                 const Tensor& to_inv_freq, const OptionalTensor& to_base_inv_freq,
                 int64_t to_start_tokens, double attention_factor,
                 const OptionalTensor& attention_factor_groups, bool interleaved,
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
  arguments.factor(attention_factor, attention_factor_groups);
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
                int64_t to_start_tokens, double attention_factor,
                const OptionalTensor& attention_factor_groups, bool interleaved) {
  check_heads("k", k, k);
  Tensor out = fresh(k);
  rerotate_to(k, positions, from_inv_freq, from_base_inv_freq, from_start_tokens, to_inv_freq,
              to_base_inv_freq, to_start_tokens, attention_factor, attention_factor_groups,
              interleaved, out);
  return out;
}

void rerotate_in_place(const Tensor& k, const Tensor& positions, const Tensor& from_inv_freq,
                       const OptionalTensor& from_base_inv_freq, int64_t from_start_tokens,
                       const Tensor& to_inv_freq, const OptionalTensor& to_base_inv_freq,
                       int64_t to_start_tokens, double attention_factor,
                       const OptionalTensor& attention_factor_groups, bool interleaved) {
  rerotate_to(k, positions, from_inv_freq, from_base_inv_freq, from_start_tokens, to_inv_freq,
              to_base_inv_freq, to_start_tokens, attention_factor, attention_factor_groups,
              interleaved, k);
}

// The tiers of the rows: a tensor [batch] of indices, -1 for keys that are not rotated.
const int64_t* row_tiers(Arguments& arguments, const char* name, const Tensor& t, const Tensor& k,
                         int64_t tiers) {
  std::ostringstream expected;
  expected << "int64 [" << k.size(0) << "]";
  LONGROPE_EXPECT(t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == k.size(0), name,
                  expected.str(), describe(t));
  check_device(name, t, k.device());
  const int64_t* const data = arguments.hold<int64_t>(t);
  for (int64_t b = 0; t.is_cpu() && b < t.size(0); ++b) {
    TORCH_CHECK_VALUE(-1 <= data[b] && data[b] < tiers, name, ": expected -1 (not rotated) to ",
                      tiers - 1, ", got ", data[b]);
  }
  return data;
}

void rerotate_rows_in_place(const Tensor& k, const Tensor& positions, const Tensor& from_tier,
                            const Tensor& to_tier, const Tensor& inv_freq,
                            const OptionalTensor& base_inv_freq, int64_t start_tokens,
                            const OptionalTensor& start_tokens_tiers, double attention_factor,
                            const OptionalTensor& attention_factor_tiers, bool interleaved) {
  Arguments arguments;
  RopeParams& p = arguments.params;
  arguments.heads("k", k, "k", k);
  arguments.positions(positions);
  p.turn = p.undo = arguments.tiers(inv_freq, base_inv_freq, start_tokens, start_tokens_tiers,
                                    attention_factor, attention_factor_tiers, true);
  p.undo.tier_rows = row_tiers(arguments, "from_tier", from_tier, k, p.undo.tiers);
  p.turn.tier_rows = row_tiers(arguments, "to_tier", to_tier, k, p.turn.tiers);
  p.interleaved = interleaved;
  check_writable("k", k);
  p.q_out = p.k;
  p.k.heads = p.k_out.heads = 0;
  const auto end = p.turn.tier_rows + p.batch;
  if (k.is_cpu() && std::equal(p.turn.tier_rows, end, p.undo.tier_rows)) return;
  run(p, k);
}

void implement(torch::Library& m) {
  m.impl("rope", &rope);
  m.impl("rope_", &rope_in_place);
  m.impl("rope_backward", &rope_backward);
  m.impl("rerotate", &rerotate);
  m.impl("rerotate_out", &rerotate_to);
  m.impl("rerotate_", &rerotate_in_place);
  m.impl("rerotate_rows_", &rerotate_rows_in_place);
}

}  // namespace

TORCH_LIBRARY_IMPL(longrope, CPU, m) { implement(m); }
#ifdef LONGROPE_CUDA
TORCH_LIBRARY_IMPL(longrope, CUDA, m) { implement(m); }
#endif

}  // namespace longrope
