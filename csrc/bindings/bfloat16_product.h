// The bfloat16 matrix product that torch carries (oneDNN: AMX, AVX512-BF16), for torch-free
// kernels.
#pragma once

#include "common/product.h"

namespace longrope {

// nullptr where this processor, or this torch, has none.
Product bfloat16_product();

// To be called on a thread after its last product: the configuration of the tile registers belongs
// to whoever multiplies next.
void release_bfloat16_product();

}  // namespace longrope
