// What the bodies of every instruction set share.
#pragma once

#include "rope/rope.h"

namespace longrope {

// Tokens per block. Enough that a head's share of a block is a long run of memory; few enough that
// the block's cosines and sines stay in the second-level cache and that threads find work.
inline int64_t rope_block_tokens(const RopeParams& p) {
  constexpr int64_t kTableValues = 8192;  // of cosines, and as many sines: 64 KiB in float32
  const int64_t most = kTableValues / p.pairs > 8 ? kTableValues / p.pairs : 8;
  const int64_t spread = p.tokens / 64 > 16 ? p.tokens / 64 : 16;
  return most < spread ? most : spread;
}

// Buffers of one thread, allocated outside the bodies (a library container that is compiled for
// AVX-512 could be picked by the linker for every caller).
struct RopeScratch {
  void* cos;              // [block tokens, pairs] in the type of the arithmetic, without the factor
  void* sin;              // the same
  void* row;              // [2 * pairs] in the type of the arithmetic
  void* cross;            // gradients: [block tokens, pairs], A of rope.h
  void* dot;              // gradients: [block tokens, pairs], B of rope.h
  uint64_t* frequencies;  // [4, pairs]
};

}  // namespace longrope
