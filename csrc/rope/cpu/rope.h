// What the bodies of every instruction set share.
#pragma once

#include "common/cpu/memory.h"
#include "rope/rows.h"

namespace longrope {

// Tokens per block. Enough that a head's share of a block is a long run of memory; few enough that
// the block's cosines and sines, those of all groups, stay in the second-level cache and that
// threads find work. Whole runs of kPhaseSpacing.
inline int64_t rope_block_tokens(const RopeParams& p) {
  constexpr int64_t kTableValues = 8192;  // of cosines, and as many sines: 64 KiB in float32
  const int64_t of_token = p.pairs * p.groups;
  const int64_t most = of_token > 0 ? kTableValues / of_token : 0, spread = p.tokens / 64;
  const int64_t tokens = most < spread ? most : spread;
  return tokens > kPhaseSpacing ? tokens / kPhaseSpacing * kPhaseSpacing : kPhaseSpacing;
}

// Whether rows of `out` go past the caches: where the result is larger than a last-level cache
// holds (it is 32 MiB on many processors) and every row is made of whole cache lines, stores need
// not read the lines that they overwrite.
inline bool rope_streams(const RopeParams& p, const RopeTensor& in, const RopeTensor& out,
                         int64_t element_bytes) {
  constexpr int64_t kLarge = 32 << 20;
  const auto lines = [&](int64_t elements) { return elements * element_bytes % kCacheLine == 0; };
  const int64_t bytes = p.batch * p.tokens * (p.q.heads + p.k.heads) * p.head_dim * element_bytes;
  return in.data != out.data && bytes >= kLarge && lines(p.head_dim) && lines(out.batch_stride) &&
         lines(out.head_stride) && lines(out.token_stride) &&
         reinterpret_cast<uintptr_t>(out.data) % kCacheLine == 0;
}

}  // namespace longrope
