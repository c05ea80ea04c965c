// What the bindings of attention check, on the CPU and on CUDA, and how they describe tensors to
// the kernels (csrc/attention/attention.h).
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "bindings/check.h"

namespace longrope::attention_bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const char* name, const Tensor& t) {
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

inline at::ScalarType lse_type(const Tensor& out) {
  return out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline AttentionTensor view_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// A fresh tensor in the memory order of `like`: [B, N, H, D] where heads lie closer than tokens,
// [B, H, N, D] otherwise. The fake kernels follow the same rule.
inline Tensor fresh(const Tensor& like) {
  const auto s = like.sizes();
  if (like.stride(1) < like.stride(2)) {
    return at::empty({s[0], s[2], s[1], s[3]}, like.options()).transpose(1, 2);
  }
  return at::empty(s, like.options());
}

// [B, heads, tokens, D] on the device and of the dtype of `like`; -1 leaves a size open.
inline void check_heads(const char* name, const Tensor& t, const Tensor& like, int64_t batch,
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
    expected << dtype_name(like.scalar_type()) << " [" << size(batch, "B") << ", "
             << size(heads, "heads") << ", " << size(tokens, "tokens") << ", "
             << size(head_dim, "D") << "]";
    LONGROPE_EXPECT(ok, name, expected.str(), describe(t));
  }
  LONGROPE_EXPECT(t.size(3) <= 1 || t.stride(3) == 1 || t.numel() == 0, name,
                  "stride 1 in the last dimension", t.strides());
}

inline void check_lse(const char* name, const Tensor& t, const Tensor& out) {
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
    std::ostringstream expected;
    expected << "an int or int64 [" << params.batch << "]";
    LONGROPE_EXPECT(
        rows->scalar_type() == at::kLong && rows->dim() == 1 && rows->size(0) == params.batch, name,
        expected.str(), describe(*rows));
    check_device(name, *rows);
    held.push_back(rows->contiguous());
    b.rows = held.back().const_data_ptr<int64_t>();
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
      check_device(name, t);
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

 private:
  void check_device(const char* name, const Tensor& t) const {
    LONGROPE_EXPECT(t.device() == device_, name, "device " + device_.str(), t.device());
  }

  at::Device device_ = at::kCPU;
};

}  // namespace longrope::attention_bindings
