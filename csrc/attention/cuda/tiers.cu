// Which queries of a row of the batch are of which tier, in steps.
//
// Step s of a row is its s-th tier that has queries: those, the keys that they see, and the tier.
// Rows may begin at different tiers; the steps after a row's last are empty. Where the tiers of a
// row fall from one query to the next, its first step takes all queries, by a tier that does not
// exist: its frequencies are NaN. Mapping: a block takes a row. Its threads look for falls along
// the queries, then each for the first query of a tier, in log2(queries) steps. Bytes moved: two
// positions for every query.
#include "attention/cuda/kernels.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 128;

struct Positions {
  const int64_t* data;
  int64_t stride;
  const int64_t* limits;
  int tiers;

  __device__ __forceinline__ int tier(int query) const {
    const int64_t position = data[query * stride];
    int tier = 0;
    while (tier + 1 < tiers && position >= limits[tier]) ++tier;
    return tier;
  }
};

__global__ void __launch_bounds__(kThreads)
    tiers_kernel(AttentionParams p, RopeParams q, const int64_t* limits, int count, Steps steps) {
  LONGROPE_SHARED(int, falls, 1);
  int* const first = reinterpret_cast<int*>(dynamic_shared());  // [tiers + 1] queries
  const int64_t row = blockIdx.x;
  const int tiers = static_cast<int>(q.turn.tiers);
  const Positions positions{q.positions + row * q.positions_batch_stride, q.positions_token_stride,
                            limits, tiers};
  const Keys queries = attending(p, row);
  const Visible visible(p, row);
  if (threadIdx.x == 0) falls[0] = 0;
  sync_threads();
  for (int i = queries.begin + 1 + threadIdx.x; i < queries.end; i += kThreads) {
    if (positions.tier(i) < positions.tier(i - 1)) falls[0] = 1;
  }
  for (int t = threadIdx.x; t <= tiers; t += kThreads) {
    int low = queries.begin, high = queries.end > low ? queries.end : low;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (positions.tier(middle) >= t) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    first[t] = low;
  }
  sync_threads();

  for (int s = threadIdx.x; s < count; s += kThreads) {
    Keys own{0, 0};
    int tier = tiers;
    if (falls[0]) {
      if (s == 0) own = queries;
    } else {
      int left = s;
      for (tier = 0; tier < tiers; ++tier) {
        if (first[tier] < first[tier + 1] && left-- == 0) break;
      }
      if (tier < tiers) own = {first[tier], first[tier + 1]};
    }
    const Keys keys = own.begin < own.end ? visible.keys(own.begin, own.end - 1) : Keys{0, 0};
    const int64_t at = s * p.batch + row;
    steps.query_begin[at] = own.begin;
    steps.query_end[at] = own.end;
    steps.key_begin[at] = keys.begin;
    steps.key_end[at] = keys.end;
    steps.tier[at] = tier;
  }
}

LONGROPE_MAX_REGISTERS(tiers_kernel, 64)

}  // namespace

void plan_steps(const AttentionParams& p, const Steps& steps, int count, cudaStream_t stream) {
  const AttentionRotation& rotation = *p.rotation;
  const size_t bytes = sizeof(int) * static_cast<size_t>(rotation.q.turn.tiers + 1);
  launch("attention", tiers_kernel, p.batch, kThreads, bytes, stream, p, rotation.q,
         rotation.limits, count, steps);
}

}  // namespace cuda
}  // namespace longrope
