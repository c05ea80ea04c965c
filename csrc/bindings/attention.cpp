// longrope::attention, attention_rotated, attention_backward, merge_attention: allocation, threads
// of the CPU, streams of CUDA. See csrc/attention/attention.h; checks are in attention_arguments.h.
#include "attention/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/cpu/tables.h"
#include "bindings/attention_arguments.h"
#include "bindings/attention_rotation.h"
#include "bindings/bfloat16_product.h"
#include "bindings/cuda.h"

namespace longrope {
namespace {

using namespace attention_bindings;

// Runs the tasks of a plan on the threads of torch: whoever is free takes the next one. `work` is
// the number of multiplications.
template <typename Run>
void run_tasks(const AttentionPlan& plan, double work, const Run& run) {
  constexpr double kWorthThreads = 1e6;  // some ten microseconds
  const int64_t workers =
      work < kWorthThreads ? 1 : std::min<int64_t>(plan.tasks, at::get_num_threads());
  if (workers == 0) return;
  const auto bytes = at::TensorOptions().dtype(at::kByte);  // torch aligns memory to 64 bytes
  const int64_t scratch_bytes = static_cast<int64_t>(plan.scratch + 63) / 64 * 64;
  const Tensor scratch = at::empty({workers, scratch_bytes}, bytes);
  uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < plan.tasks; task = next++) {
        run(task, memory + worker * scratch_bytes);
      }
      if (plan.bfloat16_products) release_bfloat16_product();
    }
  });
}

Tensor bytes_like(const Tensor& like, size_t count) {
  return at::empty({static_cast<int64_t>(count)}, like.options().dtype(at::kByte));
}

double products(const AttentionParams& p) {
  return 2.0 * p.batch * p.heads * p.queries * p.keys * p.head_dim;
}

// What the schemas call causal to softcap.
Arguments arguments_of(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                       int64_t query_start, const OptionalTensor& query_start_rows,
                       int64_t key_start, const OptionalTensor& key_start_rows, int64_t key_length,
                       const OptionalTensor& key_length_rows, int64_t query_begin,
                       const OptionalTensor& query_begin_rows, int64_t query_end,
                       const OptionalTensor& query_end_rows, int64_t window, double scale,
                       double softcap) {
  Arguments arguments;
  AttentionParams& p = arguments.params;
  arguments.heads(q, k, v);
  p.query_start = arguments.bound("query_start", query_start, query_start_rows, false);
  p.key_start = arguments.bound("key_start", key_start, key_start_rows, true);
  p.key_length = arguments.bound("key_length", key_length, key_length_rows, true);
  p.query_begin = arguments.bound("query_range", query_begin, query_begin_rows, false);
  p.query_end = arguments.bound("query_range", query_end, query_end_rows, false);
  arguments.options(causal, window, scale, softcap);
  if (p.dtype == DType::kBFloat16 && q.is_cpu()) p.bfloat16_product = bfloat16_product();
  return arguments;
}

void attend_on_cpu(const AttentionParams& p, const Tensor& q) {
  const AttentionPlan plan = attention_plan(p);
  const Tensor workspace = bytes_like(q, plan.workspace);
  void* const parts = workspace.mutable_data_ptr();
  run_tasks(plan, products(p),
            [&](int64_t task, void* scratch) { attention_cpu(p, plan, task, parts, scratch); });
  if (plan.splits > 1) {
    at::parallel_for(0, p.batch * p.heads * p.queries, 64, [&](int64_t begin, int64_t end) {
      attention_merge_splits_cpu(p, plan, parts, begin, end);
    });
  }
}

std::tuple<Tensor, Tensor> attend(AttentionParams p, const Tensor& q, const HeldRotation* turned) {
  Tensor out = fresh(q);
  Tensor lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(real_type(q)));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  if (turned) p.rotation = &turned->rotation();
#ifdef LONGROPE_CUDA
  if (out.is_cuda()) {
    if (out.numel() == 0) return {out, lse};
    on_device_of(out, [&](void* stream) {
      const Tensor workspace = bytes_like(out, attention_cuda_workspace(p));
      attention_cuda(p, workspace.mutable_data_ptr(), stream);
    });
    return {out, lse};
  }
#endif
  if (!turned) {
    if (out.numel() > 0) attend_on_cpu(p, q);
    return {out, lse};
  }
  const std::vector<int64_t> query_begin = turned->query_begin(p);  // checks, also nothing
  if (out.numel() == 0) return {out, lse};
  const AttentionTables tables(p, query_begin.data());
  const int64_t grain = 1 + 8192 / tables.piece_values();  // some twenty microseconds
  at::parallel_for(0, tables.pieces(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) tables.fill(piece);
  });
  const AttentionTiers tiers = tables.tiers();
  p.tiers = &tiers;
  attend_on_cpu(p, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                     int64_t query_start, const OptionalTensor& query_start_rows,
                                     int64_t key_start, const OptionalTensor& key_start_rows,
                                     int64_t key_length, const OptionalTensor& key_length_rows,
                                     int64_t query_begin, const OptionalTensor& query_begin_rows,
                                     int64_t query_end, const OptionalTensor& query_end_rows,
                                     int64_t window, double scale, double softcap) {
  const Arguments arguments =
      arguments_of(q, k, v, causal, query_start, query_start_rows, key_start, key_start_rows,
                   key_length, key_length_rows, query_begin, query_begin_rows, query_end,
                   query_end_rows, window, scale, softcap);
  return attend(arguments.params, q, nullptr);
}

std::tuple<Tensor, Tensor> attention_rotated(
    const Tensor& q, const Tensor& k, const Tensor& v, bool causal, int64_t query_start,
    const OptionalTensor& query_start_rows, int64_t key_start, const OptionalTensor& key_start_rows,
    int64_t key_length, const OptionalTensor& key_length_rows, int64_t query_begin,
    const OptionalTensor& query_begin_rows, int64_t query_end, const OptionalTensor& query_end_rows,
    int64_t window, double scale, double softcap, const Tensor& query_positions,
    const Tensor& key_positions, const OptionalTensor& limits, const Tensor& inv_freq,
    const OptionalTensor& base_inv_freq, int64_t start_tokens,
    const OptionalTensor& start_tokens_tiers, double attention_factor,
    const OptionalTensor& attention_factor_tiers, bool interleaved) {
  const Arguments arguments =
      arguments_of(q, k, v, causal, query_start, query_start_rows, key_start, key_start_rows,
                   key_length, key_length_rows, query_begin, query_begin_rows, query_end,
                   query_end_rows, window, scale, softcap);
  const HeldRotation turned(
      q, k,
      {query_positions, key_positions, limits, inv_freq, base_inv_freq, start_tokens,
       start_tokens_tiers, attention_factor, attention_factor_tiers, interleaved});
  return attend(arguments.params, q, &turned);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, bool causal, int64_t query_start,
    const OptionalTensor& query_start_rows, int64_t key_start, const OptionalTensor& key_start_rows,
    int64_t key_length, const OptionalTensor& key_length_rows, int64_t query_begin,
    const OptionalTensor& query_begin_rows, int64_t query_end, const OptionalTensor& query_end_rows,
    int64_t window, double scale, double softcap) {
  Arguments arguments =
      arguments_of(q, k, v, causal, query_start, query_start_rows, key_start, key_start_rows,
                   key_length, key_length_rows, query_begin, query_begin_rows, query_end,
                   query_end_rows, window, scale, softcap);
  AttentionParams& p = arguments.params;
  check_heads("out", out, q, p.batch, p.heads, p.queries, p.head_dim);
  check_heads("grad_out", grad_out, q, p.batch, p.heads, p.queries, p.head_dim);
  check_lse("lse", lse, q);
  const Tensor lse_held = lse.contiguous();
  p.out = view_of(out);
  p.lse = lse_held.data_ptr();
  AttentionBackwardParams g{p, view_of(grad_out), nullptr, {}, {}, {}};
  Tensor grad_lse_held;
  if (grad_lse) {
    check_lse("grad_lse", *grad_lse, q);
    grad_lse_held = grad_lse->contiguous();
    g.grad_lse = grad_lse_held.data_ptr();
  }
  Tensor grad_q = fresh(q), grad_k = fresh(k), grad_v = fresh(v);
  g.grad_q = view_of(grad_q);
  g.grad_k = view_of(grad_k);
  g.grad_v = view_of(grad_v);
  if (grad_q.numel() == 0 || grad_k.numel() == 0) {
    return {grad_q.zero_(), grad_k.zero_(), grad_v.zero_()};
  }
#ifdef LONGROPE_CUDA
  if (grad_q.is_cuda()) {
    on_device_of(grad_q, [&](void* stream) {
      const Tensor workspace = bytes_like(grad_q, attention_backward_cuda_workspace(g));
      attention_backward_cuda(g, workspace.mutable_data_ptr(), stream);
    });
    return {grad_q, grad_k, grad_v};
  }
#endif

  const AttentionPlan plan = attention_backward_plan(p);
  const Tensor workspace = bytes_like(q, plan.workspace);
  void* const parts = workspace.mutable_data_ptr();
  run_tasks(plan, 2.5 * products(p), [&](int64_t task, void* scratch) {
    attention_backward_cpu(g, plan, task, parts, scratch);
  });
  at::parallel_for(0, p.batch * p.heads * p.queries, 64, [&](int64_t begin, int64_t end) {
    attention_backward_finish_cpu(g, plan, parts, begin, end);
  });
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor> merge_attention(const Tensor& out_a, const Tensor& lse_a,
                                           const Tensor& out_b, const Tensor& lse_b) {
  check_heads("out_a", out_a, out_a, -1, -1, -1, -1);
  AttentionMergeParams p{};
  p.dtype = dtype_of("out_a", out_a);
  p.batch = out_a.size(0);
  p.heads = out_a.size(1);
  p.queries = out_a.size(2);
  p.head_dim = out_a.size(3);
  TORCH_CHECK_VALUE(p.head_dim <= kMaxHeadDim, "out_a: expected head_dim at most ", kMaxHeadDim,
                    ", got ", p.head_dim);
  check_heads("out_b", out_b, out_a, p.batch, p.heads, p.queries, p.head_dim);
  check_lse("lse_a", lse_a, out_a);
  check_lse("lse_b", lse_b, out_a);
  const Tensor a = lse_a.contiguous(), b = lse_b.contiguous();
  Tensor out = fresh(out_a), lse = at::empty(a.sizes(), a.options());
  p.out_a = view_of(out_a);
  p.out_b = view_of(out_b);
  p.out = view_of(out);
  p.lse_a = a.data_ptr();
  p.lse_b = b.data_ptr();
  p.lse = lse.data_ptr();
#ifdef LONGROPE_CUDA
  if (out.is_cuda()) {
    on_device_of(out, [&](void* stream) { attention_merge_cuda(p, stream); });
    return {out, lse};
  }
#endif
  at::parallel_for(0, p.batch * p.heads * p.queries, 256,
                   [&](int64_t begin, int64_t end) { attention_merge_cpu(p, begin, end); });
  return {out, lse};
}

void implement(torch::Library& m) {
  m.impl("attention", &attention);
  m.impl("attention_rotated", &attention_rotated);
  m.impl("attention_backward", &attention_backward);
  m.impl("merge_attention", &merge_attention);
}

}  // namespace

TORCH_LIBRARY_IMPL(longrope, CPU, m) { implement(m); }
#ifdef LONGROPE_CUDA
TORCH_LIBRARY_IMPL(longrope, CUDA, m) { implement(m); }
#endif

}  // namespace longrope
