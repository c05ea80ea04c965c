#include "rope/cpu/rope.h"

#include <cstring>

#include "common/cpu/vocabulary.h"
#include "common/phase.h"

#define LONGROPE_BODY "rope/cpu/body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope {

int64_t rope_blocks(const RopeParams& params) {
  return ceil_div(params.tokens, rope_block_tokens(params));
}

void rope_table_cpu(const RopeParams& params, int64_t begin, int64_t end, void* cos, void* sin) {
  LONGROPE_DISPATCH(rope_table)(params, begin, end, cos, sin);
}

void rope_cpu(const RopeParams& params, int64_t begin, int64_t end) {
  LONGROPE_DISPATCH(rope)(params, begin, end);
#if defined(__x86_64__)
  _mm_sfence();  // streamed rows are seen by other threads only behind a fence
#endif
}

void rope_backward_cpu(const RopeBackwardParams& params, int64_t begin, int64_t end) {
  LONGROPE_DISPATCH(rope_backward)(params, begin, end);
}

}  // namespace longrope
