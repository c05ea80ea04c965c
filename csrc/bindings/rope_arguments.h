// What the bindings of rope check, on the CPU and on CUDA, and how they describe tensors to the
// kernels (csrc/rope/rope.h).
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

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
    if (first) params.pairs = inv_freq.dim() > 0 ? inv_freq.size(-1) : 0;
    RopeFrequencies f{};
    f.tiers = f.start_tokens_stride = 1;
    std::tie(f.inv_freq, f.inv_freq_stride, f.inv_freq_group_stride) =
        by_group(name, inv_freq, {params.pairs}, kFiniteFrequencies);
    check_pairs(name);
    LONGROPE_EXPECT(start_tokens >= 0, "start_tokens", "0 or more", start_tokens);
    f.start_tokens = start_tokens;
    if (start_tokens_rows) f.start_tokens_rows = start_rows(*start_tokens_rows);
    base_frequencies(f, base_name, base_inv_freq, start_tokens > 0 || start_tokens_rows);
    return f;
  }

  // The same in tiers, and the factors with them: each for all rows of the batch or by row, and
  // where the op `may_group` also by group of heads.
  RopeFrequencies tiers(const Tensor& inv_freq, const OptionalTensor& base_inv_freq,
                        int64_t start_tokens, const OptionalTensor& start_tokens_tiers,
                        double attention_factor, const OptionalTensor& attention_factor_tiers,
                        bool may_group = false) {
    params.pairs = inv_freq.dim() > 0 ? inv_freq.size(-1) : 0;
    RopeFrequencies f{};
    f.tiers = inv_freq.dim() > 1 ? inv_freq.size(-2) : 0;
    const std::vector<int64_t> sizes{f.tiers, params.pairs};
    if (may_group) {
      std::tie(f.inv_freq, f.inv_freq_stride, f.inv_freq_group_stride) =
          by_group("inv_freq", inv_freq, sizes, kFiniteFrequencies);
    } else {
      std::tie(f.inv_freq, f.inv_freq_stride) =
          finite_rows("inv_freq", inv_freq, sizes, kFiniteFrequencies);
    }
    check_pairs("inv_freq");
    LONGROPE_EXPECT(f.tiers > 0, "inv_freq", "at least one tier", describe(inv_freq));
    LONGROPE_EXPECT(start_tokens >= 0, "start_tokens", "0 or more", start_tokens);
    f.start_tokens = start_tokens;
    if (start_tokens_tiers) {
      const Tensor& t = *start_tokens_tiers;
      std::tie(f.start_tokens_rows, f.start_tokens_stride) =
          rows<int64_t>("start_tokens", t, at::kLong, {f.tiers});
      for (int64_t i = 0; t.is_cpu() && i < t.numel(); ++i) {
        LONGROPE_EXPECT(f.start_tokens_rows[i] >= 0, "start_tokens", "0 or more",
                        f.start_tokens_rows[i]);
      }
    }
    base_frequencies(f, "base_inv_freq", base_inv_freq, start_tokens > 0 || start_tokens_tiers);
    factor(attention_factor, std::nullopt);
    if (attention_factor_tiers && grouped_) {
      std::tie(params.attention_factor_rows, params.attention_factor_stride,
               params.attention_factor_group_stride) =
          by_group("attention_factor", *attention_factor_tiers, {f.tiers}, kFiniteNumbers);
    } else if (attention_factor_tiers) {
      std::tie(params.attention_factor_rows, params.attention_factor_stride) =
          finite_rows("attention_factor", *attention_factor_tiers, {f.tiers}, kFiniteNumbers);
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
    params.attention_factor_stride = 1;
    TORCH_CHECK_VALUE(std::isfinite(value), "attention_factor: expected a finite number, got ",
                      value);
    if (!rows) return;
    if (grouped_ && rows->dim() == 2) {
      std::tie(params.attention_factor_rows, params.attention_factor_stride,
               params.attention_factor_group_stride) =
          by_group("attention_factor", *rows, {}, kFiniteNumbers);
      return;
    }
    std::ostringstream expected;
    expected << "a number, or float64 [] or [" << params.batch << "]";
    if (grouped_) expected << " or [" << params.batch << " or 1, " << params.groups << "]";
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

  void positions(const Tensor& t, const char* name = "positions") {
    check_rows(name, t, at::kLong, {params.tokens});
    params.positions = t.const_data_ptr<int64_t>();
    params.positions_batch_stride = t.dim() == 2 ? t.stride(0) : 0;
    params.positions_token_stride = t.stride(-1);
  }

  // The shapes and the dtype of q and k; outputs are set by the caller.
  void heads(const char* q_name, const Tensor& q, const char* k_name, const Tensor& k) {
    check_heads(q_name, q, q);
    check_heads(k_name, k, q);
    device_ = q.device();
    params.dtype = dtype_of(q_name, q);
    params.batch = q.size(0);
    params.tokens = q.size(2);
    params.head_dim = q.size(3);
    params.q = view_of(q);
    params.k = view_of(k);
  }

 private:
  // Finite float64 `sizes` for all rows of the batch, by row, or by row (or for all) and group of
  // heads. The elements, and how many there are to the next row and to the next group: 0 where
  // they share them. The first by group says how many groups there are.
  std::tuple<const double*, int64_t, int64_t> by_group(const char* name, const Tensor& t,
                                                       std::vector<int64_t> sizes,
                                                       const char* expected_values) {
    const auto dims = static_cast<int64_t>(sizes.size());
    if (t.dim() != dims + 2) {
      const auto [data, stride] = finite_rows(name, t, sizes, expected_values);
      return {data, stride, 0};
    }
    const int64_t batch = t.size(0), groups = t.size(1);
    const bool known = grouped_;
    std::ostringstream expected;
    expected << "float64 " << at::IntArrayRef(sizes) << ", by row [" << params.batch
             << ", ...], or by group of heads [" << params.batch << " or 1, ";
    if (known) {
      expected << params.groups;
    } else {
      expected << "groups";
    }
    expected << ", ...]";
    if (!known) {
      expected << " with groups into which " << params.q.heads << " and " << params.k.heads
               << " heads part evenly";
    }
    const bool fits =
        known ? groups == params.groups
              : groups > 0 && params.q.heads % groups == 0 && params.k.heads % groups == 0;
    LONGROPE_EXPECT(t.scalar_type() == at::kDouble && fits &&
                        (batch == params.batch || batch == 1) &&
                        t.sizes().slice(2) == at::IntArrayRef(sizes),
                    name, expected.str(), describe(t));
    check_device(name, t, device_);
    grouped_ = true;
    params.groups = groups;
    const double* const data = finite(name, t, hold<double>(t), expected_values);
    const int64_t count = c10::multiply_integers(sizes);
    return {data, batch == 1 ? 0 : groups * count, count};
  }

  // `sizes` of a type, for all rows of the batch or by row.
  void check_rows(const char* name, const Tensor& t, at::ScalarType type, at::IntArrayRef sizes) {
    std::vector<int64_t> by_row{params.batch};
    by_row.insert(by_row.end(), sizes.begin(), sizes.end());
    std::ostringstream expected;
    expected << dtype_name(type) << " " << sizes << " or " << at::IntArrayRef(by_row);
    LONGROPE_EXPECT(t.scalar_type() == type && (t.sizes() == sizes || t.sizes() == by_row), name,
                    expected.str(), describe(t));
    check_device(name, t, device_);
  }

  // The elements, and how many there are to the next row of the batch: 0 where rows share them.
  template <typename E>
  std::tuple<const E*, int64_t> rows(const char* name, const Tensor& t, at::ScalarType type,
                                     at::IntArrayRef sizes) {
    check_rows(name, t, type, sizes);
    const bool shared = t.dim() == static_cast<int64_t>(sizes.size());
    return {hold<E>(t), shared ? 0 : c10::multiply_integers(sizes)};
  }

  std::tuple<const double*, int64_t> finite_rows(const char* name, const Tensor& t,
                                                 at::IntArrayRef sizes, const char* expected) {
    const auto held = rows<double>(name, t, at::kDouble, sizes);
    finite(name, t, std::get<0>(held), expected);
    return held;
  }

  static const double* finite(const char* name, const Tensor& t, const double* data,
                              const char* expected) {
    for (int64_t i = 0; t.is_cpu() && i < t.numel(); ++i) {
      LONGROPE_EXPECT(std::isfinite(data[i]), name, expected,
                      (std::isnan(data[i]) ? "NaN" : "infinity"));
    }
    return data;
  }

  void check_pairs(const char* name) const {
    TORCH_CHECK_VALUE(params.pairs >= 1 && 2 * params.pairs <= params.head_dim, name,
                      ": expected 1 to ", params.head_dim / 2, " frequencies for head_dim ",
                      params.head_dim, ", got ", params.pairs);
  }

  void base_frequencies(RopeFrequencies& f, const char* name, const OptionalTensor& base_inv_freq,
                        bool required) {
    TORCH_CHECK_VALUE(base_inv_freq || !required, name, ": required with start_tokens");
    if (base_inv_freq) {
      std::tie(f.base_inv_freq, f.base_inv_freq_stride) =
          finite_rows(name, *base_inv_freq, {params.pairs}, kFiniteFrequencies);
    }
  }

  static constexpr const char* kFiniteFrequencies = "finite frequencies";
  static constexpr const char* kFiniteNumbers = "finite numbers";

  at::Device device_ = at::kCPU;
  bool grouped_ = false;  // some frequencies came by group of heads
};

}  // namespace longrope::rope_bindings
