// Device memory that the launchers divide among their kernels.
#pragma once

#include "attention/cuda/kernels.cuh"

namespace longrope::cuda {

// Hands out pieces aligned to 128 bytes from `memory`, or only counts where that is nullptr.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += ceil_div<size_t>(sizeof(T) * static_cast<size_t>(count), 128) * 128;
    return reinterpret_cast<T*>(piece);
  }

  // [batch, heads, tokens, head_dim] of p.dtype, rows as the kernels read them.
  AttentionTensor heads(const AttentionParams& p, int64_t heads, int64_t tokens) {
    const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t stride = read_columns(p);
    return {take<char>(p.batch * heads * tokens * stride * bytes), heads * tokens * stride,
            tokens * stride, stride};
  }

  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// Whether the kernels can read `x` where it lies: 16-bit elements are read 16 bytes at a time.
inline bool reads_as_is(const AttentionTensor& x, const AttentionParams& p) {
  return p.dtype == DType::kFloat32 || is_packed(x, p);
}

inline bool is_empty(const AttentionParams& p) { return p.batch * p.heads * p.queries == 0; }

inline void check_sizes(const AttentionParams& p) {
  if (p.dtype == DType::kFloat64) {
    throw std::invalid_argument("q: expected float32, bfloat16 or float16 on CUDA, got float64");
  }
  if (p.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("q: expected head_dim 1 to " + std::to_string(kMaxHeadDim));
  }
  const int64_t rows = p.kv_heads ? p.queries * (p.heads / p.kv_heads) : 0;
  if (p.keys >= kMaxPosition || rows >= kMaxPosition) {
    throw std::invalid_argument(
        "attention: expected fewer than 2^29 keys, and queries times heads that share keys, on "
        "CUDA");
  }
}

}  // namespace longrope::cuda
