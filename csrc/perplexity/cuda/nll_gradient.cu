// Forward with the gradient of hidden, for a head that is frozen: two matrix products instead of
// the three of a forward and a backward that computes the logits again. With m the largest logit of
// a row so far but the target's, E[v] = exp(logit[v] - m), R its sum over all but the target,
//
//   d nll / d hidden = (sum_{v != target} E[v] slope[v] weight[v, :]
//                       - R slope[target] weight[target, :]) / (R + E[target])
//
// (slope 1 without a softcap). The target is apart because p - 1 cancels: of a token that is all
// but certain neither E in 16 bits nor a sum that holds its E would keep a digit of the others.
//
// A chunk of logits becomes its E, which the caller multiplies by the weights and adds to `sums`;
// where m grows, what is summed already is scaled first, as in flash attention. Then one pass joins
// the two terms.
// Mapping: a warp takes a row; a lane reads 16 bytes at a time. A chunk's row is read twice, for
// its largest logit and for E, the second time from a cache. Bytes moved: 4 rows columns in, 2 (4
// for float32) rows columns out; 8 embed for the rows whose m grew, which is rare after the first
// chunks. At the end 4 rows embed of sums and one row of weight each, and the gradient out.
#include "perplexity/cuda/chunk.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr int kFlight = 4;

__device__ __forceinline__ float base_of(float largest) {
  return largest == -INFINITY ? 0.0f : largest;
}

template <typename T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    nll_gradient_chunk_kernel(NllGradientChunkParams p, bool packed) {
  const LogitsChunk& chunk = p.chunk;
  const int64_t row = row_of_warp();
  if (row >= chunk.rows) return;
  const int64_t target = chunk.targets[row];
  const bool ignored = target == chunk.ignore_index, is_first = chunk.first == 0;
  const bool here = target >= chunk.first && target < chunk.first + chunk.columns;
  const int hit = here ? static_cast<int>(target - chunk.first) : -1;
  const auto cap = static_cast<float>(chunk.softcap);
  const int lane = threadIdx.x % 32;

  const float before = is_first ? -INFINITY : p.largest[row];
  float largest = before;
  if (!ignored) {
    for_columns<kFlight>(chunk, row, packed, [&](int column, float (&x)[4], int count) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float logit = Capped(x[i], cap).logit;
        if (i < count && column + i != hit && logit > largest) largest = logit;
      }
    });
  }
  largest = warp_max(largest);

  const float base = base_of(largest);
  float sum = 0.0f;
  T* const out = static_cast<T*>(p.exponentials) + row * p.exponentials_row_stride;
  for_columns<kFlight>(chunk, row, packed, [&](int column, float (&x)[4], int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Capped capped(x[i], cap);
      const bool other = i < count && column + i != hit && !ignored;
      const float exponential = other ? expf(capped.logit - base) : 0.0f;
      sum += exponential;
      x[i] = other ? exponential * capped.slope : 0.0f;
    }
    store_columns(out + column, x, count, packed);
  });
  sum = warp_sum(sum);

  const float shrinks = is_first ? 0.0f : expf(before - base);
  if (!is_first && largest != before) {
    float* const sums = p.sums + row * p.embed;
    for (int64_t e = lane; e < p.embed; e += 32) sums[e] *= shrinks;
  }
  if (lane != 0) return;
  if (here) p.target_logit[row] = Capped(chunk.logits[row * chunk.row_stride + hit], cap).logit;
  const float others = is_first ? 0.0f : p.others[row];
  p.others[row] = (largest != before ? others * shrinks : others) + sum;
  p.largest[row] = largest;
}

LONGROPE_MAX_REGISTERS(nll_gradient_chunk_kernel, 64)

template <typename T>
__global__ void __launch_bounds__(32 * kRowsPerBlock) nll_gradient_kernel(NllGradientParams p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t target = p.targets[row];
  const int lane = threadIdx.x % 32;
  T* const out = static_cast<T*>(p.gradient) + row * p.embed;
  const bool known = target >= 0 && target < p.vocab;
  if (target == p.ignore_index || !known) {
    const float value = target == p.ignore_index ? 0.0f : NAN;
    if (lane == 0) p.nll[row] = value;
    for (int64_t e = lane; e < p.embed; e += 32) out[e] = from_float<T>(value);
    return;
  }
  // Relative to the larger of the target's logit and all others', so that nothing overflows; of an
  // infinite one the difference from itself is NaN.
  const float others = p.others[row], logit = p.target_logit[row], largest = p.largest[row];
  const float base = base_of(largest);
  const bool leads = logit > largest;
  const float ratio = expf(leads ? largest - logit : logit - base);
  const float rest = leads ? others * ratio : others;
  const float whole = rest + (leads ? 1.0f : ratio);
  if (lane == 0) {
    p.nll[row] = leads ? (logit - logit) + log1pf(rest) : (base - logit) + logf(whole);
  }
  const auto cap = static_cast<float>(p.softcap);
  const float slope = cap == 0.0f ? 1.0f : 1.0f - (logit / cap) * (logit / cap);
  const float of_sums = (leads ? ratio : 1.0f) / whole, of_target = rest / whole * slope;
  const T* const weight = static_cast<const T*>(p.weight.data) + target * p.weight.row_stride;
  const float* const sums = p.sums + row * p.embed;
  for (int64_t e = lane; e < p.embed; e += 32) {
    const float w = to_float(weight[e * p.weight.column_stride]);
    // Of an infinite weight `sums` holds 0 times infinity, where the gradient has its infinity.
    const float rest_of_all = w - w == 0.0f ? sums[e] * of_sums : 0.0f;
    out[e] = from_float<T>(rest_of_all - w * of_target);
  }
}

LONGROPE_MAX_REGISTERS(nll_gradient_kernel, 40)

template <typename T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    nll_scale_kernel(LinearNllScaleParams p, bool packed) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const bool ignored = p.targets[row] == p.ignore_index;
  const float by = ignored ? 0.0f : static_cast<const float*>(p.grad_nll)[row];
  const T* const from = static_cast<const T*>(p.gradient) + row * p.embed;
  T* const out = static_cast<T*>(p.grad_hidden) + row * p.embed;
  constexpr int kUnit = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  if (packed) {
    for (int64_t e = kUnit * lane; e < p.embed; e += 32 * kUnit) {
      float x[kUnit];
      unpack(load<kUnit>(from + e), x);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) x[i] = ignored ? 0.0f : x[i] * by;
      store(out + e, pack<T>(x));
    }
  } else {
    for (int64_t e = lane; e < p.embed; e += 32) {
      out[e] = from_float<T>(ignored ? 0.0f : to_float(from[e]) * by);
    }
  }
}

LONGROPE_MAX_REGISTERS(nll_scale_kernel, 40)

}  // namespace
}  // namespace cuda

void linear_nll_gradient_chunk_cuda(const NllGradientChunkParams& params, void* stream) {
  const LogitsChunk& chunk = params.chunk;
  if (chunk.rows == 0) return;
  cuda::for_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool packed = cuda::rows_are_packed(chunk.logits, chunk.row_stride) &&
                        cuda::rows_are_packed(params.exponentials, params.exponentials_row_stride);
    cuda::launch_rows("linear_nll_with_gradient", cuda::nll_gradient_chunk_kernel<T>, chunk.rows,
                      stream, params, packed);
  });
}

void linear_nll_gradient_cuda(const NllGradientParams& params, void* stream) {
  if (params.rows == 0) return;
  cuda::for_dtype(params.dtype, [&](auto zero) {
    cuda::launch_rows("linear_nll_with_gradient", cuda::nll_gradient_kernel<decltype(zero)>,
                      params.rows, stream, params);
  });
}

void linear_nll_scale_cuda(const LinearNllScaleParams& params, void* stream) {
  if (params.rows == 0) return;
  cuda::for_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool packed = cuda::is_aligned(params.gradient) && cuda::is_aligned(params.grad_hidden) &&
                        params.embed * sizeof(T) % 16 == 0;
    cuda::launch_rows("linear_nll_scale", cuda::nll_scale_kernel<T>, params.rows, stream, params,
                      packed);
  });
}

}  // namespace longrope
