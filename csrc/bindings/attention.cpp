// longrope::attention, attention_grad, merge_attention: checks, allocation, threads. See
// csrc/attention/attention.h.
#include "attention/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/bfloat16_product.h"
#include "bindings/check.h"
#include "bindings/cuda.h"

namespace longrope {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxHeadDim = 256;

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kDouble:
      TORCH_CHECK_VALUE(t.is_cpu(), name, ": expected float32, bfloat16 or float16 on ", t.device(),
                        ", got ", describe(t));
      return DType::kFloat64;
    default:
      TORCH_CHECK_VALUE(false, name, ": expected float32, bfloat16, float16 or float64, got ",
                        describe(t));
  }
}

at::ScalarType lse_type(const Tensor& out) {
  return out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

AttentionTensor view_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// A fresh tensor in the memory order of `like`: [B, N, H, D] where heads lie closer than tokens,
// [B, H, N, D] otherwise. The fake kernels follow the same rule.
Tensor fresh(const Tensor& like) {
  const auto s = like.sizes();
  if (like.stride(1) < like.stride(2)) {
    return at::empty({s[0], s[2], s[1], s[3]}, like.options()).transpose(1, 2);
  }
  return at::empty(s, like.options());
}

// [B, heads, tokens, D] on the device and of the dtype of `like`; -1 leaves a size open.
void check_heads(const char* name, const Tensor& t, const Tensor& like, int64_t batch,
                 int64_t heads, int64_t tokens, int64_t head_dim) {
  LONGROPE_EXPECT(t.device() == like.device(), name, "device " + like.device().str(), t.device());
  const auto fits = [](int64_t wanted, int64_t got) { return wanted < 0 || wanted == got; };
  const bool ok = t.scalar_type() == like.scalar_type() && t.dim() == 4 && fits(batch, t.size(0)) &&
                  fits(heads, t.size(1)) && fits(tokens, t.size(2)) && fits(head_dim, t.size(3));
  if (!ok) {
    std::ostringstream expected;
    const auto size = [](int64_t wanted, const char* open) {
      return wanted < 0 ? std::string(open) : std::to_string(wanted);
    };
    expected << toString(like.scalar_type()) << " [" << size(batch, "B") << ", "
             << size(heads, "heads") << ", " << size(tokens, "tokens") << ", "
             << size(head_dim, "D") << "]";
    LONGROPE_EXPECT(ok, name, expected.str(), describe(t));
  }
  LONGROPE_EXPECT(t.size(3) <= 1 || t.stride(3) == 1 || t.numel() == 0, name,
                  "stride 1 in the last dimension", t.strides());
}

void check_lse(const char* name, const Tensor& t, const Tensor& out) {
  LONGROPE_EXPECT(t.device() == out.device(), name, "device " + out.device().str(), t.device());
  std::ostringstream expected;
  expected << (lse_type(out) == at::kDouble ? "float64 " : "float32 ") << out.sizes().slice(0, 3);
  LONGROPE_EXPECT(t.scalar_type() == lse_type(out) && t.sizes() == out.sizes().slice(0, 3), name,
                  expected.str(), describe(t));
}

// Holds what the parameters point to.
struct Arguments {
  AttentionParams params{};
  std::vector<Tensor> held;

  void heads(const Tensor& q, const Tensor& k, const Tensor& v) {
    AttentionParams& p = params;
    check_heads("q", q, q, -1, -1, -1, -1);
    p.dtype = dtype_of("q", q);
    p.head_dim = q.size(3);
    TORCH_CHECK_VALUE(p.head_dim >= 1 && p.head_dim <= kMaxHeadDim, "q: expected head_dim 1 to ",
                      kMaxHeadDim, ", got ", p.head_dim);
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.queries = q.size(2);
    check_heads("k", k, q, p.batch, -1, -1, p.head_dim);
    p.kv_heads = k.size(1);
    p.keys = k.size(2);
    TORCH_CHECK_VALUE(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0,
                      "k: expected a number of heads that divides the ", p.heads,
                      " heads of q, got ", p.kv_heads);
    check_heads("v", v, q, p.batch, p.kv_heads, p.keys, p.head_dim);
    p.q = view_of(q);
    p.k = view_of(k);
    p.v = view_of(v);
  }

  AttentionBound bound(const char* name, int64_t all, const OptionalTensor& rows, bool is_key) {
    AttentionBound b{nullptr, all};
    const auto check = [&](int64_t value) {
      TORCH_CHECK_VALUE(!is_key || (0 <= value && value <= params.keys), name, ": expected 0 to ",
                        params.keys, " (the keys), got ", value);
    };
    if (!rows) {
      check(all);
      return b;
    }
    std::ostringstream expected;
    expected << "an int or int64 [" << params.batch << "]";
    LONGROPE_EXPECT(
        rows->scalar_type() == at::kLong && rows->dim() == 1 && rows->size(0) == params.batch, name,
        expected.str(), describe(*rows));
    LONGROPE_EXPECT(rows->is_cpu(), name, "device cpu", rows->device());
    held.push_back(rows->contiguous());
    b.rows = held.back().const_data_ptr<int64_t>();
    for (int64_t i = 0; i < params.batch; ++i) check(b.rows[i]);
    return b;
  }

  void options(bool causal, int64_t window, double scale, double softcap) {
    TORCH_CHECK_VALUE(window >= 0, "window: expected 1 or more, or none, got ", window);
    TORCH_CHECK_VALUE(std::isfinite(scale), "scale: expected a finite number, got ", scale);
    TORCH_CHECK_VALUE(std::isfinite(softcap) && softcap >= 0,
                      "softcap: expected a positive number, or none, got ", softcap);
    params.causal = causal;
    params.window = window;
    params.scale = scale;
    params.softcap = softcap;
  }

  AttentionRotation rotation(const char* name, const OptionalTensor& cos, const OptionalTensor& sin,
                             int64_t tokens, bool interleaved) {
    AttentionRotation r{};
    TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), name,
                      ": expected cosines and sines, got only one of them");
    if (!cos) return r;
    for (const Tensor& t : {*cos, *sin}) {
      const int64_t pairs = t.dim() == 3 ? t.size(2) : -1;
      std::ostringstream expected;
      expected << "float32 [1 or " << params.batch << ", " << tokens << ", 1 to "
               << params.head_dim / 2 << "]";
      LONGROPE_EXPECT(t.scalar_type() == at::kFloat && pairs >= 1 && 2 * pairs <= params.head_dim &&
                          t.size(1) == tokens && (t.size(0) == 1 || t.size(0) == params.batch) &&
                          t.sizes() == cos->sizes(),
                      name, expected.str(), describe(t));
      LONGROPE_EXPECT(t.is_cpu(), name, "device cpu", t.device());
      held.push_back(t.contiguous());
    }
    r.cos = held[held.size() - 2].const_data_ptr<float>();
    r.sin = held[held.size() - 1].const_data_ptr<float>();
    r.pairs = cos->size(2);
    r.token_stride = r.pairs;
    r.batch_stride = cos->size(0) == 1 ? 0 : tokens * r.pairs;
    r.interleaved = interleaved;
    return r;
  }
};

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

double products(const AttentionParams& p) {
  return 2.0 * p.batch * p.heads * p.queries * p.keys * p.head_dim;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                     int64_t query_start, const OptionalTensor& query_start_rows,
                                     int64_t key_start, const OptionalTensor& key_start_rows,
                                     int64_t key_length, const OptionalTensor& key_length_rows,
                                     int64_t window, double scale, double softcap,
                                     const OptionalTensor& query_cos,
                                     const OptionalTensor& query_sin, const OptionalTensor& key_cos,
                                     const OptionalTensor& key_sin, bool interleaved) {
  Arguments arguments;
  AttentionParams& p = arguments.params;
  arguments.heads(q, k, v);
  p.query_start = arguments.bound("query_start", query_start, query_start_rows, false);
  p.key_start = arguments.bound("key_start", key_start, key_start_rows, true);
  p.key_length = arguments.bound("key_length", key_length, key_length_rows, true);
  arguments.options(causal, window, scale, softcap);
  TORCH_CHECK_VALUE(query_cos.has_value() == key_cos.has_value(),
                    "rotation: expected tables for queries and keys, got only one of them");
  p.rotate_q = arguments.rotation("query rotation", query_cos, query_sin, p.queries, interleaved);
  p.rotate_k = arguments.rotation("key rotation", key_cos, key_sin, p.keys, interleaved);
  Tensor out = fresh(q);
  Tensor lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(lse_type(q)));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  if (out.numel() == 0) return {out, lse};
  if (p.dtype == DType::kBFloat16) p.bfloat16_product = bfloat16_product();

  const AttentionPlan plan = attention_plan(p);
  const Tensor workspace =
      at::empty({static_cast<int64_t>(plan.workspace)}, at::TensorOptions().dtype(at::kByte));
  void* const parts = workspace.mutable_data_ptr();
  run_tasks(plan, products(p),
            [&](int64_t task, void* scratch) { attention_cpu(p, plan, task, parts, scratch); });
  if (plan.splits > 1) {
    at::parallel_for(0, p.batch * p.heads * p.queries, 64, [&](int64_t begin, int64_t end) {
      attention_merge_splits_cpu(p, plan, parts, begin, end);
    });
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_grad(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, bool causal, int64_t query_start,
    const OptionalTensor& query_start_rows, int64_t key_start, const OptionalTensor& key_start_rows,
    int64_t key_length, const OptionalTensor& key_length_rows, int64_t window, double scale,
    double softcap) {
  Arguments arguments;
  AttentionParams& p = arguments.params;
  arguments.heads(q, k, v);
  p.query_start = arguments.bound("query_start", query_start, query_start_rows, false);
  p.key_start = arguments.bound("key_start", key_start, key_start_rows, true);
  p.key_length = arguments.bound("key_length", key_length, key_length_rows, true);
  arguments.options(causal, window, scale, softcap);
  check_heads("out", out, q, p.batch, p.heads, p.queries, p.head_dim);
  check_heads("grad_out", grad_out, q, p.batch, p.heads, p.queries, p.head_dim);
  check_lse("lse", lse, q);
  const Tensor lse_held = lse.contiguous();
  p.out = view_of(out);
  p.lse = lse_held.data_ptr();
  AttentionGradParams g{p, view_of(grad_out), nullptr, {}, {}, {}};
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

  const AttentionPlan plan = attention_grad_plan(p);
  const Tensor workspace =
      at::empty({static_cast<int64_t>(plan.workspace)}, at::TensorOptions().dtype(at::kByte));
  void* const parts = workspace.mutable_data_ptr();
  run_tasks(plan, 2.5 * products(p), [&](int64_t task, void* scratch) {
    attention_grad_cpu(g, plan, task, parts, scratch);
  });
  at::parallel_for(0, p.batch * p.heads * p.queries, 64, [&](int64_t begin, int64_t end) {
    attention_grad_finish_cpu(g, plan, parts, begin, end);
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

}  // namespace

TORCH_LIBRARY_IMPL(longrope, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_grad", &attention_grad);
  m.impl("merge_attention", &merge_attention);
}
#ifdef LONGROPE_CUDA
TORCH_LIBRARY_IMPL(longrope, CUDA, m) { m.impl("merge_attention", &merge_attention); }
#endif

}  // namespace longrope
