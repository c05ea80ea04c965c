// The element types of the ops, without torch.
#pragma once

namespace longrope {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace longrope
