// What the bindings of attention check, on the CPU and on CUDA, and how they describe tensors to
// the kernels (csrc/attention/attention.h).
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <sstream>
#include <string>

#include "attention/attention.h"
#include "bindings/arguments.h"

namespace longrope::attention_bindings {

inline AttentionTensor view_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// [B, heads, tokens, D] on the device and of the dtype of `like`; -1 leaves a size open.
inline void check_heads(const char* name, const Tensor& t, const Tensor& like, int64_t batch,
                        int64_t heads, int64_t tokens, int64_t head_dim) {
  check_device(name, t, like.device());
  const auto fits = [](int64_t wanted, int64_t got) { return wanted < 0 || wanted == got; };
  const bool ok = t.scalar_type() == like.scalar_type() && t.dim() == 4 && fits(batch, t.size(0)) &&
                  fits(heads, t.size(1)) && fits(tokens, t.size(2)) && fits(head_dim, t.size(3));
  if (!ok) {
    std::ostringstream expected;
    const auto size = [](int64_t wanted, const char* open) {
      return wanted < 0 ? std::string(open) : std::to_string(wanted);
    };
    expected << dtype_name(like.scalar_type()) << " [" << size(batch, "B") << ", "
             << size(heads, "heads") << ", " << size(tokens, "tokens") << ", "
             << size(head_dim, "D") << "]";
    LONGROPE_EXPECT(ok, name, expected.str(), describe(t));
  }
  LONGROPE_EXPECT(t.size(3) <= 1 || t.stride(3) == 1 || t.numel() == 0, name,
                  "stride 1 in the last dimension", t.strides());
}

inline void check_lse(const char* name, const Tensor& t, const Tensor& out) {
  check_device(name, t, out.device());
  std::ostringstream expected;
  expected << (real_type(out) == at::kDouble ? "float64 " : "float32 ") << out.sizes().slice(0, 3);
  LONGROPE_EXPECT(t.scalar_type() == real_type(out) && t.sizes() == out.sizes().slice(0, 3), name,
                  expected.str(), describe(t));
}

struct Arguments : HeldTensors {
  AttentionParams params{};

  void heads(const Tensor& q, const Tensor& k, const Tensor& v) {
    AttentionParams& p = params;
    device_ = q.device();
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
    b.rows = hold_rows(name, *rows, params.batch, device_);
    // On CUDA that would wait for the device: the kernels take the nearest that is in range.
    for (int64_t i = 0; rows->is_cpu() && i < params.batch; ++i) check(b.rows[i]);
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

 private:
  at::Device device_ = at::kCPU;
};

}  // namespace longrope::attention_bindings
