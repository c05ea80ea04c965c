// Exact rotation angles on the device (common/phase.h says how phases are represented).
#pragma once

#include "common/cuda/device.cuh"
#include "common/phase.h"

namespace longrope::cuda {

// cos and sin of a fixed point phase to float32 rounding, by the polynomials of the CPU kernels
// (rope/cpu/table_body.h): the nearest quarter turn is taken off in integers, so that small rests
// keep all their bits, and what remains is within an eighth of a turn.
__device__ __forceinline__ void cos_sin(uint64_t phase, float& cos, float& sin) {
  const uint64_t rounded = phase + (uint64_t{1} << 61);
  const int quadrant = static_cast<int>(rounded >> 62);
  const auto rest = static_cast<int64_t>(phase - (rounded & uint64_t{3} << 62));
  const float t = static_cast<float>(rest) * 0x1p-64f;
  const float z = t * t;
  // sin(2 pi t) with 2 pi in two parts, and cos(2 pi t), minimax on [-1/8, 1/8].
  const float s_low =
      ((-75.4533964115f * z + 81.5939369558f) * z - 41.3416731616f) * z - 1.74845560e-7f;
  const float s = fmaf(t, 6.28318548f, t * s_low);
  const float c =
      (((59.2459642889f * z - 85.4437417324f) * z + 64.9393264717f) * z - 19.7392086937f) * z +
      1.0f;
  const float x = quadrant & 1 ? s : c;
  const float y = quadrant & 1 ? c : s;
  cos = (quadrant + 1) & 2 ? -x : x;
  sin = quadrant & 2 ? -y : y;
}

// A frequency in fixed point. NaN and infinity, which it cannot say, are kept beside it: `valid` is
// 1 or NaN and multiplies what the frequency gives.
struct Frequency {
  uint64_t turns;
  float valid;
};

__device__ __forceinline__ Frequency frequency_of(double inv_freq) {
  const double zero_or_nan = inv_freq - inv_freq;
  return {turns_per_token(inv_freq), 1.0f + static_cast<float>(zero_or_nan)};
}

// The elements of pair j of a unit's two packs.
template <bool kInterleaved, int kCount>
__device__ __forceinline__ float& one_of(float (&x)[kCount], float (&y)[kCount], int j) {
  if constexpr (kInterleaved) return 2 * j < kCount ? x[2 * j] : y[2 * j - kCount];
  return x[j];
}

template <bool kInterleaved, int kCount>
__device__ __forceinline__ float& two_of(float (&x)[kCount], float (&y)[kCount], int j) {
  if constexpr (kInterleaved) return 2 * j + 1 < kCount ? x[2 * j + 1] : y[2 * j + 1 - kCount];
  return y[j];
}

// Turns the pairs of a unit. Each fused product is written out: of a difference of two products a
// compiler may round either first, and packed and unpacked rows would differ in their last bits.
template <bool kInterleaved, typename T, int kCount>
__device__ __forceinline__ void rotate(Pack<T, kCount>& first, Pack<T, kCount>& second,
                                       const float (&cos)[kCount], const float (&sin)[kCount]) {
  float x[kCount], y[kCount];
  unpack(first, x);
  unpack(second, y);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float& one = one_of<kInterleaved>(x, y, j);
    float& two = two_of<kInterleaved>(x, y, j);
    const float turned = fmaf(one, cos[j], -(two * sin[j]));
    two = fmaf(two, cos[j], one * sin[j]);
    one = turned;
  }
  first = pack<T>(x);
  second = pack<T>(y);
}

}  // namespace longrope::cuda
