// Which products a plan takes.
#pragma once

#include "attention/attention.h"
#include "common/cpu/isa.h"

namespace longrope {

// The caller's bfloat16 product uses the processor's best instructions, which a smaller set in use
// does not allow.
inline bool multiplies_in_bfloat16(const AttentionParams& p) {
  return p.dtype == DType::kBFloat16 && p.bfloat16_product && isa() == best_isa();
}

}  // namespace longrope
