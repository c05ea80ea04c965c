// Gradients of inv_freq, base_inv_freq and attention_factor, summed over the tokens of a block.
//
// Formula: RopeBackwardParams in csrc/rope/rope.h. The sums A and B over heads are taken in
// float32, what is summed over tokens in float64. Mapping: a block takes one row of the batch, a
// run of tokens and up to kThreads units of pairs; a thread one unit (8 pairs of 16-bit elements, 4
// of float32) of every tokens-per-pass-th token, for which it walks through all heads of q and k
// with 16-byte accesses. Its sums over tokens are in slots of shared memory that no other thread
// touches until the end, when one thread a pair adds the slots in the order of tokens:
// deterministic, without atomics. Bytes moved: 2 (H + Hk) N R elements (inputs and gradients, each
// once), and 8 (R + 1) bytes out a block.
#include <algorithm>

#include "common/cuda/device.cuh"
#include "rope/cuda/frequencies.cuh"
#include "rope/rope.h"

namespace longrope {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;  // token blocks of a row: enough for any device, few to add up

struct Tiling {
  int sets;        // of frequencies
  int units;       // of a block
  int lanes;       // tokens of a pass
  int64_t tokens;  // of a block
  int64_t blocks;  // of tokens, per row of the batch
  int chunks;      // of units
  bool has_base;
};

Tiling tiling_of(const RopeParams& p, int count) {
  Tiling t{};
  const int64_t units = p.pairs / count;
  t.sets = frequency_sets(p);
  t.units = static_cast<int>(std::min<int64_t>(units, kThreads));
  t.chunks = static_cast<int>(ceil_div<int64_t>(units, t.units));
  t.lanes = kThreads / t.units;
  const int64_t passes = ceil_div<int64_t>(p.tokens, t.lanes);
  t.tokens = t.lanes * std::max<int64_t>(1, ceil_div<int64_t>(passes, kMaxBlocks));
  t.blocks = ceil_div<int64_t>(p.tokens, t.tokens);
  t.has_base = p.turn.base_inv_freq || p.undo.base_inv_freq;
  return t;
}

// Adds the products of one token and head to A and B.
template <bool kInterleaved, typename T, int kCount>
__device__ __forceinline__ void add_head(const T* x, const T* g, int first, int second,
                                         float (&cross)[kCount], float (&dot)[kCount]) {
  float xa[kCount], xb[kCount], ga[kCount], gb[kCount];
  unpack(load<kCount>(x + first), xa);
  unpack(load<kCount>(x + second), xb);
  unpack(load<kCount>(g + first), ga);
  unpack(load<kCount>(g + second), gb);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float x1 = one_of<kInterleaved>(xa, xb, j), x2 = two_of<kInterleaved>(xa, xb, j);
    const float g1 = one_of<kInterleaved>(ga, gb, j), g2 = two_of<kInterleaved>(ga, gb, j);
    cross[j] += x1 * g2 - x2 * g1;
    dot[j] += x1 * g1 + x2 * g2;
  }
}

// The same for all heads of a token.
template <typename T, int kCount>
__device__ __forceinline__ void add_token(const RopeTensor& in, const RopeTensor& grad, int64_t row,
                                          int64_t token, int first, int second, bool interleaved,
                                          float (&cross)[kCount], float (&dot)[kCount]) {
  const T* x = static_cast<const T*>(in.data) + row * in.batch_stride + token * in.token_stride;
  const T* g =
      static_cast<const T*>(grad.data) + row * grad.batch_stride + token * grad.token_stride;
#pragma unroll 2
  for (int64_t head = 0; head < in.heads; ++head) {
    if (interleaved) {
      add_head<true>(x, g, first, second, cross, dot);
    } else {
      add_head<false>(x, g, first, second, cross, dot);
    }
    x += in.head_stride;
    g += grad.head_stride;
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    rope_backward_kernel(RopeBackwardParams params, Tiling tiling) {
  const RopeParams& p = params.forward;
  const int64_t row = blockIdx.x / tiling.blocks, block = blockIdx.x % tiling.blocks;
  const int unit = threadIdx.x % tiling.units, lane = threadIdx.x / tiling.units;
  const int pair = (static_cast<int>(blockIdx.y) * tiling.units + unit) * kCount;
  const bool works = lane < tiling.lanes && pair < p.pairs;
  // Slots [1 or 2: inv_freq, base_inv_freq][lanes][pairs of the block], and one a thread of
  // factors.
  const int width = tiling.units * kCount, slots = tiling.lanes * width;
  auto* sums = reinterpret_cast<double*>(dynamic_shared());
  double* factors = sums + (tiling.has_base ? 2 : 1) * slots;
  constexpr RowTiers kTiers{0, 0};  // one set for each row
  RowFrequencies frequencies(p, row, kTiers, tiling.sets,
                             reinterpret_cast<unsigned char*>(factors + kThreads));
  frequencies.fill(p, row, kTiers, tiling.sets);
  if (works) {
    for (int j = 0; j < kCount; ++j) {
      sums[lane * width + unit * kCount + j] = 0;
      if (tiling.has_base) sums[slots + lane * width + unit * kCount + j] = 0;
    }
  }

  const bool turns = p.turn.inv_freq != nullptr;
  const double factor = factor_of(p, row, kTiers);
  const int unit_index = pair / kCount;
  const int first = first_of<kCount>(p, unit_index), second = second_of<kCount>(p, unit_index);
  const int64_t end =
      (block + 1) * tiling.tokens < p.tokens ? (block + 1) * tiling.tokens : p.tokens;
  double factor_sum = 0;
  for (int64_t token = block * tiling.tokens + lane; works && token < end; token += tiling.lanes) {
    float cross[kCount] = {}, dot[kCount] = {}, cos[kCount], sin[kCount];
    add_token<T>(p.q, params.grad_q, row, token, first, second, p.interleaved, cross, dot);
    add_token<T>(p.k, params.grad_k, row, token, first, second, p.interleaved, cross, dot);
    const int64_t position = position_of(p, row, token);
    frequencies.turn(p, position, pair, 1.0f, cos, sin);
    const double scale = (turns ? factor : -factor) * static_cast<double>(position);
    const bool below = is_below(turns ? frequencies.turn_start : frequencies.undo_start, position);
    double* slot = sums + (below ? slots : 0) + lane * width + unit * kCount;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const double a = cross[j], b = dot[j], c = cos[j], s = sin[j];
      slot[j] += scale * (a * c - b * s);
      factor_sum += b * c + a * s;
    }
  }
  factors[threadIdx.x] = factor_sum;
  sync_threads();

  // One row of params.partial: what is not this chunk's share is zero.
  double* partial = params.partial + ((row * tiling.blocks + block) * tiling.chunks + blockIdx.y) *
                                         (2 * p.pairs + 1);
  const int begin = static_cast<int>(blockIdx.y) * width;
  for (int i = threadIdx.x; i < 2 * p.pairs; i += kThreads) {
    const bool base = i >= p.pairs;
    const int column = (base ? i - static_cast<int>(p.pairs) : i) - begin;
    double sum = 0;
    if (column >= 0 && column < width && (!base || tiling.has_base)) {
      const double* slot = sums + (base ? slots : 0) + column;
      for (int l = 0; l < tiling.lanes; ++l) sum += slot[l * width];
    }
    partial[i] = sum;
  }
  if (threadIdx.x < 32) {
    double sum = 0;
    for (int i = threadIdx.x; i < kThreads; i += 32) sum += factors[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) partial[2 * p.pairs] = sum;
  }
}

LONGROPE_MAX_REGISTERS(rope_backward_kernel, 100)

template <typename T>
int pack_of(const RopeBackwardParams& params) {
  constexpr int kCount = 16 / sizeof(T);
  const RopeParams& p = params.forward;
  bool packed = p.pairs % kCount == 0;
  for (const RopeTensor* t : {&p.q, &p.k, &params.grad_q, &params.grad_k}) {
    packed = packed && packs(*t, kCount, sizeof(T));
  }
  return packed ? kCount : 1;
}

template <typename T, int kCount>
void run(const RopeBackwardParams& params, cudaStream_t stream) {
  const RopeParams& p = params.forward;
  const Tiling t = tiling_of(p, kCount);
  const size_t slots = static_cast<size_t>(t.lanes) * t.units * kCount * (t.has_base ? 2 : 1);
  launch("rope_backward", rope_backward_kernel<T, kCount>, {p.batch * t.blocks, t.chunks}, kThreads,
         (slots + kThreads) * sizeof(double) + frequency_bytes(p), stream, params, t);
}

template <typename T>
void run(const RopeBackwardParams& params, cudaStream_t stream) {
  pack_of<T>(params) > 1 ? run<T, 16 / sizeof(T)>(params, stream) : run<T, 1>(params, stream);
}

}  // namespace
}  // namespace cuda

int64_t rope_backward_cuda_blocks(const RopeBackwardParams& params) {
  return cuda::for_dtype(params.forward.dtype, [&](auto zero) {
    // The same for every group of heads, since what is packed is for all of them.
    const cuda::Tiling t = cuda::tiling_of(params.forward, cuda::pack_of<decltype(zero)>(params));
    return t.blocks * t.chunks;
  });
}

void rope_backward_cuda(const RopeBackwardParams& params, void* stream) {
  if (params.forward.batch == 0 || params.forward.tokens == 0) return;
  const int64_t blocks = rope_backward_cuda_blocks(params);
  cuda::for_dtype(params.forward.dtype, [&](auto zero) {
    for (int64_t group = 0; group < params.forward.groups; ++group) {
      cuda::run<decltype(zero)>(group_of(params, group, blocks), static_cast<cudaStream_t>(stream));
    }
  });
}

}  // namespace longrope
