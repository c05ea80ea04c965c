// How the bindings word their errors: the argument, what was expected, what came. One sentence.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <sstream>
#include <string>

namespace longrope {

// "float32 [2, 8, 16, 64]"
inline std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  switch (tensor.scalar_type()) {  // Python's names
    case at::kFloat:
      text << "float32";
      break;
    case at::kDouble:
      text << "float64";
      break;
    case at::kBFloat16:
      text << "bfloat16";
      break;
    case at::kHalf:
      text << "float16";
      break;
    case at::kLong:
      text << "int64";
      break;
    case at::kInt:
      text << "int32";
      break;
    default:
      text << tensor.scalar_type();
  }
  text << " " << tensor.sizes();
  return text.str();
}

}  // namespace longrope

// ValueError "name: expected <expected>, got <got>".
#define LONGROPE_EXPECT(condition, name, expected, got) \
  TORCH_CHECK_VALUE(condition, name, ": expected ", expected, ", got ", got)
