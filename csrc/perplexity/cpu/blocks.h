// What the forward and the backward of linear cross-entropy share: memory, the choice of operand
// type, blocks of tokens as panels, and rows of the weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu/isa.h"
#include "perplexity/cpu/kernels.h"
#include "perplexity/perplexity.h"

namespace longrope::perplexity {

constexpr int64_t kPanel = 64;          // tokens per panel
constexpr int64_t kBlockTokens = 2048;  // tokens packed at a time: bounds the memory

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised memory on a cache-line boundary.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, round_up(std::max<int64_t>(bytes, 1), 64))),
              &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  char* at(int64_t byte) const { return data_.get() + byte; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  std::unique_ptr<char, void (*)(void*)> data_;
};

// The types of the products' operands and accumulators.
struct Arithmetic {
  Arithmetic(const LinearNllParams& params, const Runtime& runtime) : runtime(runtime) {
    // oneDNN's bfloat16 kernels take k in whole blocks of 32; real models have that.
    const bool native = runtime.bfloat16_product && params.embed % 32 == 0 && isa() == best_isa();
    operand = params.dtype == DType::kFloat16               ? DType::kFloat32
              : params.dtype == DType::kBFloat16 && !native ? DType::kFloat32
                                                            : params.dtype;
    wide = operand == DType::kFloat64;
    operand_bytes = bytes_of(operand);
    accumulator = wide ? DType::kFloat64 : DType::kFloat32;
    accumulator_bytes = bytes_of(accumulator);
  }

  // C[m, n] (+)= A[m, k] B[k, n], B a panel of n columns.
  void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add, const void* a,
                const void* b, void* c) const {
    if (k == 0) {
      if (!add) {
        for (int64_t i = 0; i < m; ++i) {
          char* row = static_cast<char*>(c) + i * ldc * accumulator_bytes;
          std::fill(row, row + n * accumulator_bytes, 0);
        }
      }
    } else if (wide) {
      float64_product(m, n, k, lda, ldc, add, a, b, c);
    } else if (operand == DType::kBFloat16) {
      runtime.bfloat16_product(m, n, k, lda, n, ldc, add, a, b, static_cast<float*>(c));
    } else {
      runtime.float_product(m, n, k, lda, n, ldc, add, a, b, static_cast<float*>(c));
    }
  }

  void end_of_task() const {
    if (runtime.end_of_task) runtime.end_of_task();
  }

  const Runtime& runtime;
  DType operand;
  DType accumulator;
  bool wide;
  int64_t operand_bytes;
  int64_t accumulator_bytes;
};

// `count` tokens in panels of kPanel, the last as narrow as whole groups of `group` allow.
struct Panels {
  Panels(int64_t count, int64_t group)
      : count(count),
        panels(ceil_div(count, kPanel)),
        padded(panels ? (panels - 1) * kPanel + round_up(count - (panels - 1) * kPanel, group)
                      : 0) {}
  int64_t width(int64_t panel) const { return std::min(kPanel, padded - panel * kPanel); }
  int64_t tokens(int64_t panel) const { return std::min(kPanel, count - panel * kPanel); }

  int64_t count;
  int64_t panels;
  int64_t padded;
};

// The rows that are not ignored: only these are computed.
inline std::vector<int64_t> scored_rows(const LinearNllParams& params) {
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < params.rows; ++r) {
    if (params.targets[r] != params.ignore_index) rows.push_back(r);
  }
  return rows;
}

// The hidden states of the picked tokens as panels whose k runs over the embedding.
inline Buffer pack_hidden(const LinearNllParams& params, const Arithmetic& arithmetic,
                          const int64_t* pick, const Panels& panels) {
  Buffer packed(panels.padded * params.embed * arithmetic.operand_bytes);
  arithmetic.runtime.for_each(panels.panels, [&](int64_t p) {
    Buffer rows(kPanel * params.embed * arithmetic.operand_bytes);
    convert_rows(params.dtype, params.hidden, pick, p * kPanel, panels.tokens(p), params.embed,
                 arithmetic.operand, rows.as<void>());
    panel_of_columns(arithmetic.operand, rows.as<void>(), panels.tokens(p), params.embed,
                     panels.width(p),
                     packed.at(p * kPanel * params.embed * arithmetic.operand_bytes));
  });
  return packed;
}

// Whether rows of the weight can be an operand as they lie.
inline bool weight_in_place(const LinearNllParams& params, const Arithmetic& arithmetic) {
  return params.dtype == arithmetic.operand && params.weight.column_stride == 1 &&
         params.weight.row_stride >= params.embed;
}

inline const char* weight_at(const LinearNllParams& params, int64_t row) {
  return static_cast<const char*>(params.weight.data) +
         row * params.weight.row_stride * bytes_of(params.dtype);
}

}  // namespace longrope::perplexity
