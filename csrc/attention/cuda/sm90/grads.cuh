// What the kernels of the gradients share on compute capability 9.0.
#pragma once

#include "attention/cuda/kernels.cuh"
#include "attention/cuda/sm90/panels.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/tile.cuh"

namespace longrope::cuda::sm90 {

// The weight of a score and the gradient of its product (without scale) in the places of the
// product and of the gradient of the weight, as Score::weigh without its branches.
template <bool kSoftcap>
__device__ __forceinline__ void weigh(const Score& score, float& product, float& grad,
                                      float log2_sum, float delta) {
  if (kSoftcap) {
    const float t = score.tanh_of(product);
    product = exp2_approx(fmaf(t, score.outer, -log2_sum));
    grad = product * (grad - delta) * fmaf(-t, t, 1.0f);
  } else {
    product = exp2_approx(fmaf(product, score.inner, -log2_sum));
    grad = product * (grad - delta);
  }
}

// What copies take.
struct GradMaps {
  TensorMap q, grad_out, k, v;

  // Of tiles of so many rows and keys.
  GradMaps(const AttentionBackwardParams& g, int rows, int keys)
      : q(map_of(g.forward.q, g.forward, g.forward.heads, g.forward.queries, rows)),
        grad_out(map_of(g.grad_out, g.forward, g.forward.heads, g.forward.queries, rows)),
        k(map_of(g.forward.k, g.forward, g.forward.kv_heads, g.forward.keys, keys)),
        v(map_of(g.forward.v, g.forward, g.forward.kv_heads, g.forward.keys, keys)) {}
};

// Calls f(type, head_dim, has_softcap) with what kernels are instantiated for.
template <typename F>
void for_kernel(const AttentionParams& p, const F& f) {
  const auto with_type = [&](auto type) {
    const auto with_size = [&](auto size) {
      p.softcap != 0.0 ? f(type, size, std::true_type()) : f(type, size, std::false_type());
    };
    p.head_dim <= 64 ? with_size(std::integral_constant<int, 64>())
                     : with_size(std::integral_constant<int, 128>());
  };
  p.dtype == DType::kBFloat16 ? with_type(bf16{}) : with_type(f16{});
}

}  // namespace longrope::cuda::sm90
