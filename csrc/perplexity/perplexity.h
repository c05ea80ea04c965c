// Linear cross-entropy: the negative log-likelihood of each row without a [rows, vocab] tensor.
//
//   logits[t, v] = hidden[t, :] . weight[v, :]          (then softcap * tanh(. / softcap), if any)
//   nll[t]       = log(sum_v exp(logits[t, v])) - logits[t, targets[t]]
//   d logits     = (exp(logits - lse) - onehot(targets)) * grad_nll
//
// The logits exist only as tiles of a few hundred vocabulary rows by 64 tokens that stay in the
// core's own cache. Everything here knows nothing of torch: pointers and strides come in
// LinearNllParams, threads and matrix products in Runtime.
#pragma once

#include <cstdint>
#include <functional>

#include "common/dtype.h"
#include "common/product.h"

namespace longrope {

// A matrix [rows, columns]; strides in elements, any value.
struct MatrixView {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
};

struct LinearNllParams {
  DType dtype;             // of hidden, weight and their gradients
  MatrixView hidden;       // [rows, embed]
  MatrixView weight;       // [vocab, embed]
  const int64_t* targets;  // [rows], contiguous: in [0, vocab) or ignore_index
  int64_t rows;
  int64_t embed;
  int64_t vocab;
  int64_t ignore_index;  // rows with this target are skipped: nll 0, no gradient
  double softcap;        // 0: none

  // float64 where dtype is, else float32; contiguous. A log-sum-exp is kept as its two parts, the
  // largest logit and the log of the sum relative to it: their sum would round large logits away.
  void* nll;    // [rows], written by the forward
  void* stats;  // [2, rows]: largest logit, log of the sum; written by the forward

  // The backward: null where a gradient is not wanted. The gradients are contiguous, of `dtype`.
  const void* grad_nll;  // [rows], as nll
  void* grad_hidden;     // [rows, embed]
  void* grad_weight;     // [vocab, embed]
};

struct Runtime {
  int64_t threads = 1;
  // Calls the body once for every index in [0, count), on up to `threads` threads.
  std::function<void(int64_t count, const std::function<void(int64_t)>& body)> for_each;
  Product float_product = nullptr;
  Product bfloat16_product = nullptr;  // null: bfloat16 is widened to float, chunk by chunk
  void (*end_of_task)() = nullptr;     // called by each thread after its last product; may be null
};

void linear_nll_cpu(const LinearNllParams& params, const Runtime& runtime);
void linear_nll_backward_cpu(const LinearNllParams& params, const Runtime& runtime);

// Writes nll and, as grad_hidden, the gradient for a grad_nll of 1: for a head that is frozen,
// where linear_nll_scale_cpu is then the whole backward. stats, grad_nll and grad_weight are not
// used.
void linear_nll_with_gradient_cpu(const LinearNllParams& params, const Runtime& runtime);

// grad_hidden[t, :] = grad_nll[t] * gradient[t, :], 0 for rows that are ignored.
struct LinearNllScaleParams {
  DType dtype;
  const void* gradient;    // [rows, embed], contiguous
  const void* grad_nll;    // [rows], contiguous, float64 where dtype is, else float32
  const int64_t* targets;  // [rows]
  int64_t rows, embed, ignore_index;
  void* grad_hidden;  // [rows, embed], contiguous
};

void linear_nll_scale_cpu(const LinearNllScaleParams& params, int64_t begin, int64_t end);

// The sum of nll (float32, or float64 where `wide`) and the number of rows that are not ignored,
// by candidate: sums [candidates] and counts [candidates] are overwritten. Rows are added in order,
// in float64, so the result does not depend on the number of threads.
void candidate_sums_cpu(const void* nll, bool wide, const int64_t* targets,
                        const int64_t* candidate, int64_t rows, int64_t candidates,
                        int64_t ignore_index, double* sums, int64_t* counts);

// CUDA: the matrix products are the caller's (cuBLAS, through torch). It computes the logits of
// some rows and a part of the vocabulary at a time, in float32, and these kernels reduce them.
// Every pointer is device memory, `stream` a cudaStream_t; nothing waits for the device.
struct LogitsChunk {
  const float* logits;  // [rows, columns], contiguous but for row_stride; before the softcap
  int64_t row_stride;
  int64_t rows;
  int64_t first, columns;  // the chunk's part of the vocabulary: [first, first + columns)
  int64_t vocab;
  const int64_t* targets;  // [rows]; one that is neither in [0, vocab) nor ignored: NaN
  int64_t ignore_index;
  double softcap;  // 0: none
};

// To be called for the chunks of the vocabulary in order; the first one (first == 0) begins.
struct NllChunkParams {
  LogitsChunk chunk;
  float* target_logit;       // [rows], kept between the chunks
  float *largest, *log_sum;  // [rows], kept between; after the last chunk the two parts of stats
  float* nll;                // [rows], written by the last chunk
};

// d logits of the chunk, rounded to `dtype`.
struct NllBackwardChunkParams {
  LogitsChunk chunk;
  const float *largest, *log_sum, *grad_nll;  // [rows]
  DType dtype;
  void* grad_logits;  // [rows, columns], contiguous but for grad_row_stride
  int64_t grad_row_stride;
};

// The forward with the gradient of a frozen head. To be called for the chunks of the vocabulary in
// order; after each the caller adds exponentials * weight of the chunk to `sums` (after the first
// one it writes them).
struct NllGradientChunkParams {
  LogitsChunk chunk;
  // [rows], kept between the chunks: the largest logit but the target's, the sum of exponentials
  // relative to it of all but the target, and the target's logit.
  float *largest, *others, *target_logit;
  DType dtype;
  void* exponentials;  // [rows, columns] of dtype, contiguous but for exponentials_row_stride:
  int64_t exponentials_row_stride;  // times the softcap's slope; 0 for the target
  float* sums;                      // [rows, embed], scaled here where `largest` grows
  int64_t embed;
};

// After the last chunk: nll and its gradient for a grad_nll of 1.
struct NllGradientParams {
  const int64_t* targets;  // [rows]
  int64_t rows, embed, vocab, ignore_index;
  double softcap;
  DType dtype;
  MatrixView weight;                             // [vocab, embed]
  const float *largest, *others, *target_logit;  // [rows]
  const float* sums;                             // [rows, embed]
  float* nll;                                    // [rows]
  void* gradient;                                // [rows, embed], contiguous
};

// candidate_sums on the device; a candidate out of range counts nowhere.
struct CandidateSumsParams {
  const float* nll;                    // [rows]
  const int64_t *targets, *candidate;  // [rows]
  int64_t rows, candidates, ignore_index;
  double* sums;     // [candidates]
  int64_t* counts;  // [candidates]
};

void linear_nll_chunk_cuda(const NllChunkParams& params, void* stream);
void linear_nll_backward_chunk_cuda(const NllBackwardChunkParams& params, void* stream);
void linear_nll_gradient_chunk_cuda(const NllGradientChunkParams& params, void* stream);
void linear_nll_gradient_cuda(const NllGradientParams& params, void* stream);
void linear_nll_scale_cuda(const LinearNllScaleParams& params, void* stream);
void candidate_sums_cuda(const CandidateSumsParams& params, void* stream);

}  // namespace longrope
