// What the bindings of rope check, on the CPU and on CUDA, and how they describe tensors to the
// kernels (csrc/rope/rope.h).
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <sstream>
#include <string>
#include <tuple>

#include "bindings/arguments.h"
#include "rope/rope.h"

namespace longrope::rope_bindings {

inline RopeTensor view_of(const Tensor& t) {
  return {t.data_ptr(), t.size(1), t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_heads(const char* name, const Tensor& t, const Tensor& q) {
  const std::string expected = "[B, heads, N, D]";
  LONGROPE_EXPECT(t.dim() == 4, name, expected, describe(t));
  check_device(name, t, q.device());
  LONGROPE_EXPECT(t.scalar_type() == q.scalar_type() && t.size(0) == q.size(0) &&
                      t.size(2) == q.size(2) && t.size(3) == q.size(3),
                  name, "the dtype, B, N and D of " + describe(q), describe(t));
  LONGROPE_EXPECT(t.stride(3) == 1 || t.numel() == 0, name, "stride 1 in the last dimension",
                  t.strides());
}

struct Arguments : HeldTensors {
  RopeParams params{};

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
      check_device(what, t, device_);
      params.pairs = pairs;
      TORCH_CHECK_VALUE(pairs >= 1 && 2 * pairs <= params.head_dim, what, ": expected 1 to ",
                        params.head_dim / 2, " frequencies for head_dim ", params.head_dim,
                        ", got ", pairs);
      const double* data = hold<double>(t);
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
    const int64_t* data = hold_rows("start_tokens", t, params.batch, device_);
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
    check_device("attention_factor", *rows, device_);
    params.attention_factor_rows = hold<double>(rows->expand({params.batch}));
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
    check_device("positions", t, device_);
    params.positions = t.const_data_ptr<int64_t>();
    params.positions_batch_stride = t.dim() == 2 ? t.stride(0) : 0;
    params.positions_token_stride = t.stride(-1);
  }

  // The shapes and the dtype of q and k; outputs are set by the caller.
  void heads(const char* q_name, const Tensor& q, const char* k_name, const Tensor& k) {
    check_heads(q_name, q, q);
    check_heads(k_name, k, q);
    device_ = q.device();
    params.dtype = dtype_of("q", q);
    params.batch = q.size(0);
    params.tokens = q.size(2);
    params.head_dim = q.size(3);
    params.q = view_of(q);
    params.k = view_of(k);
  }

 private:
  at::Device device_ = at::kCPU;
};

}  // namespace longrope::rope_bindings
