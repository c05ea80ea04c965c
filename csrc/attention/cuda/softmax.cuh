// Scores and the online softmax of rows that lie in the lanes as mma_16x8x16 leaves them.
#pragma once

#include "attention/attention.h"
#include "common/cuda/device.cuh"

namespace longrope::cuda {

constexpr auto kLog2E = static_cast<float>(longrope::kLog2E);
constexpr auto kLn2 = static_cast<float>(longrope::kLn2);

// The power of two that a product q . k stands for is unit times apply(product), or unit times the
// product itself where is_product: then unit is positive, so that the largest product is the
// largest score.
struct Score {
  float inner, outer;  // outer tanh(inner product), or inner product where outer is 0
  float unit;
  bool is_product;

  __device__ __forceinline__ explicit Score(const AttentionParams& p) {
    const auto scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
    outer = cap * kLog2E;
    inner = cap != 0.0f ? scale / cap : scale * kLog2E;
    is_product = cap == 0.0f && scale > 1e-30f;
    unit = is_product ? inner : 1.0f;
  }

  // tanh(x) as 1 - 2 / (1 + exp(2 x)): within 2e-7, which is as good as float32 scores get.
  __device__ __forceinline__ float tanh_of(float product) const {
    return fmaf(-2.0f, reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2E * inner * product)),
                1.0f);
  }
  __device__ __forceinline__ float apply(float product) const {
    return outer != 0.0f ? outer * tanh_of(product) : inner * product;
  }
  // The weight of a score and the gradient of its product (without scale), from that of the weight
  // and the terms of its row. Both take the places of their arguments.
  __device__ __forceinline__ void weigh(float& product, float& grad, float log2_sum,
                                        float delta) const {
    float slope = 1.0f;
    if (outer != 0.0f) {
      const float t = tanh_of(product);
      product = outer * t;
      slope = fmaf(-t, t, 1.0f);
    } else if (!is_product) {
      product = inner * product;
    }
    product = exp2_approx(fmaf(product, unit, -log2_sum));
    grad = product * (grad - delta) * slope;
  }

  template <int kM, int kN>
  __device__ __forceinline__ void apply(float (&s)[kM][kN][4]) const {
    auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kM * kN * 4; ++i) {
        float& x = s[i / (4 * kN)][i / 4 % kN][i % 4];
        x = f(x);
      }
    };
    if (outer != 0.0f) {
      each([&](float x) { return outer * tanh_of(x); });
    } else {
      each([&](float x) { return inner * x; });
    }
  }
};

// Of 16 kM rows; a lane keeps the two of each sixteen that its accumulators belong to.
template <int kM>
struct Softmax {
  float largest[kM][2];  // of the scores without unit, equal in the four lanes of a row
  float sum[kM][2];      // of this lane's weights

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      largest[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0.0f;
    }
  }

  // 2^(unit x - shift) has no NaN where all scores are -inf.
  static __device__ __forceinline__ float shift_of(float largest, float unit) {
    return largest == -INFINITY ? 0.0f : largest * unit;
  }

  // Turns scores into weights relative to the largest so far. `before` is what weights relative to
  // the last largest are worth now; says whether that is not 1 for a row of this lane.
  template <int kN>
  __device__ __forceinline__ bool weigh(float (&s)[kM][kN][4], float (&before)[kM][2], float unit) {
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Two chains: one waits for the result of the instruction before it.
        float even = largest[i][half], odd = s[i][0][2 * half + 1];
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          even = fmaxf(even, s[i][j][2 * half]);
          odd = fmaxf(odd, s[i][j][2 * half + 1]);
        }
        const float most = warp_max(fmaxf(even, odd), 4);
        const float shift = shift_of(most, unit);
        // Exactly 1 where nothing grows: a power of a rounding error, once a tile, would add up.
        const bool more = most > largest[i][half];
        before[i][half] = more ? exp2_approx(fmaf(largest[i][half], unit, -shift)) : 1.0f;
        grows = grows || more;
        largest[i][half] = most;
        float total = 0.0f;
#pragma unroll
        for (int e = 0; e < 2 * kN; ++e) {
          float& x = s[i][e / 2][2 * half + e % 2];
          x = exp2_approx(fmaf(x, unit, -shift));
          total += x;
        }
        sum[i][half] = sum[i][half] * before[i][half] + total;
      }
    }
    return grows;
  }

  template <int kColumns>
  static __device__ __forceinline__ void rescale(float (&o)[kM][kColumns][4],
                                                 const float (&before)[kM][2]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int e = 0; e < 4 * kColumns; ++e) o[i][e / 4][e % 4] *= before[i][e % 4 / 2];
    }
  }

  // Turns scores into weights and o along with them: most tiles bring no larger score to any row of
  // the warp, and then o stays as it is.
  template <int kN, int kColumns>
  __device__ __forceinline__ void add(float (&s)[kM][kN][4], float (&o)[kM][kColumns][4],
                                      float unit) {
    float before[kM][2];
    if (any(kAllLanes, weigh(s, before, unit))) rescale(o, before);
  }

  // The factors of o that make it the output, and the log-sum-exps: 0 and -inf for rows without a
  // weight.
  __device__ __forceinline__ void finish(float unit, float (&inverse)[kM][2], float (&lse)[kM][2]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = warp_sum(sum[i][half], 4), most = largest[i][half];
        inverse[i][half] = total == 0.0f ? 0.0f : 1.0f / total;
        lse[i][half] = most == INFINITY ? most : kLn2 * shift_of(most, unit) + logf(total);
      }
    }
  }
};

}  // namespace longrope::cuda
