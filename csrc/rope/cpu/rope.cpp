#include "rope/cpu/rope.h"

#include <cstring>

#include "common/cpu/vocabulary.h"
#include "common/phase.h"

#define LONGROPE_BODY "rope/cpu/body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope {
namespace {

// Calls visit(group, begin, end) with the items of each group of heads among [begin, end), counted
// from the group's first.
template <typename Visit>
void for_groups(const RopeParams& p, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t items = p.batch * rope_blocks(p);  // of a group
  while (begin < end) {
    const int64_t group = begin / items, first = group * items;
    const int64_t stop = end < first + items ? end : first + items;
    visit(group, begin - first, stop - first);
    begin = stop;
  }
}

}  // namespace

int64_t rope_blocks(const RopeParams& params) {
  return ceil_div(params.tokens, rope_block_tokens(params));
}

void rope_table_cpu(const RopeParams& params, int64_t begin, int64_t end, void* cos, void* sin) {
  LONGROPE_DISPATCH(rope_table)(params, begin, end, cos, sin);
}

void rope_cpu(const RopeParams& params, int64_t begin, int64_t end) {
  for_groups(params, begin, end, [&](int64_t group, int64_t first, int64_t stop) {
    LONGROPE_DISPATCH(rope)(group_of(params, group), first, stop);
  });
#if defined(__x86_64__)
  _mm_sfence();  // streamed rows are seen by other threads only behind a fence
#endif
}

void rope_backward_cpu(const RopeBackwardParams& params, int64_t begin, int64_t end) {
  const RopeParams& p = params.forward;
  for_groups(p, begin, end, [&](int64_t group, int64_t first, int64_t stop) {
    LONGROPE_DISPATCH(rope_backward)(group_of(params, group, rope_blocks(p)), first, stop);
  });
}

}  // namespace longrope
