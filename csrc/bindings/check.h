// How the bindings word their errors: the argument, what was expected, what came. One sentence.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <sstream>
#include <string>

namespace longrope {

// Python's name of a type.
inline std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    default:
      return toString(type);
  }
}

// "float32 [2, 8, 16, 64]"
inline std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << " " << tensor.sizes();
  return text.str();
}

}  // namespace longrope

// ValueError "name: expected <expected>, got <got>".
#define LONGROPE_EXPECT(condition, name, expected, got) \
  TORCH_CHECK_VALUE(condition, name, ": expected ", expected, ", got ", got)
