// The element types of the ops, without torch.
#pragma once

#include <cstdint>

namespace longrope {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

inline int64_t bytes_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Of the arithmetic on elements of `type`.
inline int64_t real_bytes_of(DType type) { return type == DType::kFloat64 ? 8 : 4; }

}  // namespace longrope
