// What the bindings of every op do with their arguments and results.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/check.h"
#include "bindings/huge_pages.h"
#include "common/dtype.h"

namespace longrope {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of the argument `name`, where the kernels of its device take it.
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

// The type of sums over elements of `t`, in which log-sum-exps are returned.
inline at::ScalarType real_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A fresh tensor in the memory order of `like`: [B, N, H, D] where heads lie closer than tokens,
// [B, H, N, D] otherwise. The fake kernels follow the same rule.
inline Tensor fresh(const Tensor& like) {
  const auto s = like.sizes();
  const bool token_major = like.stride(1) < like.stride(2);
  const Tensor memory = token_major ? at::empty({s[0], s[2], s[1], s[3]}, like.options())
                                    : at::empty(s, like.options());
  prefer_huge_pages(memory);
  return token_major ? memory.transpose(1, 2) : memory;
}

inline void check_device(const char* name, const Tensor& t, at::Device device) {
  LONGROPE_EXPECT(t.device() == device, name, "device " + device.str(), t.device());
}

// Contiguous tensors that parameters point to, kept alive for as long as these live.
class HeldTensors {
 public:
  template <typename E>
  const E* hold(const Tensor& t) {
    held_.push_back(t.contiguous());
    return held_.back().const_data_ptr<E>();
  }

  // An argument with a value for every row of the batch, given as an int too elsewhere.
  const int64_t* hold_rows(const char* name, const Tensor& t, int64_t batch, at::Device device) {
    std::ostringstream expected;
    expected << "an int or int64 [" << batch << "]";
    LONGROPE_EXPECT(t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == batch, name,
                    expected.str(), describe(t));
    check_device(name, t, device);
    return hold<int64_t>(t);
  }

 private:
  std::vector<Tensor> held_;
};

}  // namespace longrope
