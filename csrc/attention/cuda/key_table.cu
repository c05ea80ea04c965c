// Cosines and sines of the keys of a step, for decode.cu: [batch, keys, 2 pairs] of float32.
//
// Mapping: a block takes a run of keys of one row of the batch, a thread four pairs of a key. Bytes
// moved: 8 pairs out for each key.
#include <algorithm>

#include "attention/cuda/kernels.cuh"
#include "rope/cuda/frequencies.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 32;  // of a block, for which the frequencies are made once
constexpr int kCount = 4;    // pairs of a thread

__global__ void __launch_bounds__(kThreads)
    key_table_kernel(RopeParams p, KeyTable table, float* out, int sets, unsigned tiles) {
  const int64_t row = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x % tiles) * kTokens;
  const int64_t begin = p.token_begin_rows[row], end = p.token_end_rows[row];
  if (first + kTokens <= begin || first >= end) return;
  const RowTiers tiers = tiers_of(p, row);
  RowFrequencies frequencies(p, row, tiers, sets, dynamic_shared());
  frequencies.fill(p, row, tiers, sets);
  const auto factor = static_cast<float>(factor_of(p, row, tiers));
  const int units = table.pairs / kCount;
  for (int i = threadIdx.x; i < kTokens * units; i += kThreads) {
    const int64_t key = first + i / units;
    if (key < begin || key >= end) continue;
    const int pair = i % units * kCount;
    float cos[kCount], sin[kCount];
    frequencies.turn(p, position_of(p, row, key), pair, factor, cos, sin);
    float* const target = out + (row * table.keys + key) * 2 * table.pairs + pair;
    store(target, pack<float>(cos));
    store(target + table.pairs, pack<float>(sin));
  }
}

LONGROPE_MAX_REGISTERS(key_table_kernel, 64)

}  // namespace

void fill_key_table(const RopeParams& k, const KeyTable& table, float* out, cudaStream_t stream) {
  const int64_t tiles = ceil_div<int64_t>(k.tokens, kTokens);
  if (tiles == 0) return;
  launch("attention", key_table_kernel, k.batch * tiles, kThreads, frequency_bytes(k), stream, k,
         table, out, frequency_sets(k), static_cast<unsigned>(tiles));
}

}  // namespace cuda
}  // namespace longrope
