// Forward rotation of q and k (also their gradient, turning back, and rerotate).
//
// Formula: csrc/rope/rope.h. Arithmetic in float32 on 64-bit fixed point phases; one rounding
// to the element type at the store.
// Mapping: a block takes one row of the batch, a tile of tokens and up to kHeadsPerBlock heads of q
// or of k (one launch serves both). A thread keeps the cosines and sines of one unit (8 pairs of
// 16-bit elements, 4 of float32) of one token in registers and walks through the heads with 16-byte
// accesses, kFlight heads in flight; neighbouring threads take neighbouring units, so a warp reads
// whole rows. Threads beyond the rotated dimensions copy. Bytes moved: 2 (H + Hk) N D elements
// (each element once in, once out), positions and frequencies from the cache. The cosines of a
// token are computed once for kHeadsPerBlock heads.
#include <algorithm>

#include "common/cuda/device.cuh"
#include "rope/cuda/frequencies.cuh"
#include "rope/rope.h"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeadsPerBlock = 8;  // for which the sines of a token are made once
constexpr int kFlight = 4;  // of them: 32 registers of the 80 that three blocks leave each thread

struct Tiling {
  int sets;           // of frequencies
  int units;          // of a token, the last ones copying
  int rotated_units;  // that turn
  int tokens;         // per block
  int q_chunks;       // of heads
  int64_t tiles;      // of tokens, per row of the batch
};

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 3) rope_kernel(RopeParams p, Tiling tiling) {
  const int64_t row = blockIdx.x / tiling.tiles, tile = blockIdx.x % tiling.tiles;
  const RowTiers tiers = tiers_of(p, row);
  if (stays(p, tiers)) return;
  int64_t token_begin = tile * tiling.tokens, token_end = token_begin + tiling.tokens;
  token_end = token_end < p.tokens ? token_end : p.tokens;
  if (p.token_begin_rows) {
    const int64_t first = p.token_begin_rows[row], end = p.token_end_rows[row];
    if (first >= token_end || end <= token_begin) return;
    token_end = end < token_end ? end : token_end;
    token_begin = first > token_begin ? first : token_begin;
  }
  // The chunks of q come first, then those of k.
  const bool is_q = static_cast<int>(blockIdx.y) < tiling.q_chunks;
  const int begin =
      kHeadsPerBlock * static_cast<int>(is_q ? blockIdx.y : blockIdx.y - tiling.q_chunks);
  const int heads = static_cast<int>(is_q ? p.q.heads : p.k.heads) - begin;
  const int count = heads < kHeadsPerBlock ? heads : kHeadsPerBlock;
  const int64_t in_stride = is_q ? p.q.head_stride : p.k.head_stride;
  const int64_t out_stride = is_q ? p.q_out.head_stride : p.k_out.head_stride;
  const T* in_row = static_cast<const T*>(is_q ? p.q.data : p.k.data) + begin * in_stride +
                    row * (is_q ? p.q.batch_stride : p.k.batch_stride);
  T* out_row = static_cast<T*>(is_q ? p.q_out.data : p.k_out.data) + begin * out_stride +
               row * (is_q ? p.q_out.batch_stride : p.k_out.batch_stride);
  const float factor = static_cast<float>(factor_of(p, row, tiers));
  const auto offsets = [&](int unit, int& first, int& second) {
    const bool turns = unit < tiling.rotated_units;
    first = turns ? first_of<kCount>(p, unit)
                  : 2 * static_cast<int>(p.pairs) + 2 * kCount * (unit - tiling.rotated_units);
    second = turns ? second_of<kCount>(p, unit) : first + kCount;
  };

  // What this thread reads first is on its way while the block makes the frequencies: to the
  // second-level cache, for which no registers are needed.
  const int64_t first_token = token_begin + threadIdx.x / tiling.units;
  if (threadIdx.x < tiling.tokens * tiling.units && first_token < token_end) {
    int first, second;
    offsets(threadIdx.x % tiling.units, first, second);
    const T* in = in_row + first_token * (is_q ? p.q.token_stride : p.k.token_stride);
#pragma unroll
    for (int j = 0; j < kFlight; ++j, in += in_stride) {
      if (j >= count) break;
      prefetch_l2(in + first);
      if (second < p.head_dim) prefetch_l2(in + second);
    }
  }
  RowFrequencies frequencies(p, row, tiers, tiling.sets, dynamic_shared());
  frequencies.fill(p, row, tiers, tiling.sets);

  for (int item = threadIdx.x; item < tiling.tokens * tiling.units; item += blockDim.x) {
    const int64_t token = token_begin + item / tiling.units;
    if (token >= token_end) break;
    const int unit = item % tiling.units;
    const bool turns = unit < tiling.rotated_units;
    float cos[kCount], sin[kCount];
    int first, second;
    offsets(unit, first, second);
    if (turns) {
      frequencies.turn(p, position_of(p, row, token), unit * kCount, factor, cos, sin);
    }
    const bool has_second = second < p.head_dim;
    const T* in = in_row + token * (is_q ? p.q.token_stride : p.k.token_stride);
    T* out = out_row + token * (is_q ? p.q_out.token_stride : p.k_out.token_stride);

    for (int head = 0; head < count; head += kFlight) {
      Pack<T, kCount> x[kFlight], y[kFlight];
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (head + j < count) {
          x[j] = load<kCount>(in + first);
          if (has_second) y[j] = load<kCount>(in + second);
          in += in_stride;
        }
      }
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (head + j < count) {
          if (turns && p.interleaved) rotate<true>(x[j], y[j], cos, sin);
          if (turns && !p.interleaved) rotate<false>(x[j], y[j], cos, sin);
          store(out + first, x[j]);
          if (has_second) store(out + second, y[j]);
          out += out_stride;
        }
      }
    }
  }
}

LONGROPE_MAX_REGISTERS(rope_kernel, 80)

template <typename T, int kCount>
void run(const RopeParams& p, cudaStream_t stream) {
  Tiling tiling{};
  tiling.sets = frequency_sets(p);
  tiling.rotated_units = static_cast<int>(p.pairs / kCount);
  tiling.units = tiling.rotated_units +
                 static_cast<int>(ceil_div<int64_t>(p.head_dim - 2 * p.pairs, 2 * kCount));
  const int fit = kThreads / tiling.units;
  tiling.tokens = static_cast<int>(std::min<int64_t>(fit > 1 ? fit : 1, p.tokens));
  tiling.tiles = ceil_div<int64_t>(p.tokens, tiling.tokens);
  const int threads = std::min(kThreads, ceil_div(tiling.tokens * tiling.units, 32) * 32);
  tiling.q_chunks = static_cast<int>(ceil_div<int64_t>(p.q.heads, kHeadsPerBlock));
  const int64_t chunks = tiling.q_chunks + ceil_div<int64_t>(p.k.heads, kHeadsPerBlock);
  launch("rope", rope_kernel<T, kCount>, {p.batch * tiling.tiles, chunks}, threads,
         frequency_bytes(p), stream, p, tiling);
}

template <typename T>
void run(const RopeParams& p, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  bool packed = p.pairs % kCount == 0 && p.head_dim % kCount == 0;
  for (const RopeTensor* t : {&p.q, &p.k, &p.q_out, &p.k_out}) {
    packed = packed && packs(*t, kCount, sizeof(T));
  }
  packed ? run<T, kCount>(p, stream) : run<T, 1>(p, stream);
}

}  // namespace
}  // namespace cuda

void rope_cuda(const RopeParams& params, void* stream) {
  if (params.batch == 0 || params.tokens == 0 || params.q.heads + params.k.heads == 0) return;
  cuda::for_dtype(params.dtype, [&](auto zero) {
    for (int64_t group = 0; group < params.groups; ++group) {
      cuda::run<decltype(zero)>(group_of(params, group), static_cast<cudaStream_t>(stream));
    }
  });
}

}  // namespace longrope
