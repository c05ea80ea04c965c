// Rotary position embedding with rescaled frequencies: LongRoPE (arXiv 2402.13753), equation 1.
//
//   phase(b, n, i) = position(b, n) * frequency(b, i)                    see common/phase.h
//   (y1, y2) = factor(b) * (x1 cos - x2 sin, x2 cos + x1 sin)            of the phase
//
// of pair i = (x[i], x[i + pairs]), or (x[2i], x[2i + 1]) interleaved. Elements from 2 pairs on are
// copied. Frequencies and factors may also differ between groups of heads: frequency(b, g, i) and
// factor(b, g) with g = h / (heads / groups), for q and for k by their own numbers of heads, so
// that a query head turns as the key head that it attends. Rotation is by `turn` minus `undo`: rope
// uses the first, its gradient the second, and rerotate both.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace longrope {

// [batch, heads, tokens, head_dim] with stride 1 in head_dim; strides count elements.
struct RopeTensor {
  void* data;
  int64_t heads;
  int64_t batch_stride, head_stride, token_stride;
};

// Frequencies of one factor set, or of several tiers of which every row of the batch has one. Rows
// with start_tokens > 0 turn the positions below it by base_inv_freq.
struct RopeFrequencies {
  // [batch or 1, groups or 1, tiers, pairs], radians per token; nullptr: no rotation
  const double* inv_freq;
  const double* base_inv_freq;    // [batch or 1, pairs]; nullptr where no row has start tokens
  int64_t inv_freq_stride;        // elements to the next row of the batch; 0: shared
  int64_t inv_freq_group_stride;  // elements to the next group of heads; 0: shared
  int64_t base_inv_freq_stride;   // as inv_freq_stride
  int64_t tiers;                  // at least 1
  // [batch], or nullptr: the first. A row without (negative) does not turn; on CUDA one beyond the
  // last becomes NaN.
  const int64_t* tier_rows;
  const int64_t* start_tokens_rows;  // [batch or 1, tiers] or nullptr: then
  int64_t start_tokens_stride;       // elements to the next row of the batch; 0: shared
  int64_t start_tokens;              // for every row
};

struct RopeParams {
  RopeTensor q, k;          // read
  RopeTensor q_out, k_out;  // written; may be the memory of q and k, else without overlap
  DType dtype;
  int64_t batch, tokens, head_dim;
  int64_t pairs;       // rotary_dim / 2
  int64_t groups = 1;  // of heads, into which those of q and of k part evenly
  bool interleaved;
  const int64_t* positions;  // [batch or 1, tokens], may be negative
  int64_t positions_batch_stride, positions_token_stride;
  // CUDA: tokens [begin, end) of each row turn, [batch]; others are neither read nor written.
  // nullptr: all tokens of all rows.
  const int64_t *token_begin_rows, *token_end_rows;
  RopeFrequencies turn, undo;
  // By tier; where `turn` and `undo` both have tier_rows, the one's divided by the other's.
  const double* attention_factor_rows;    // [batch or 1, groups or 1, tiers] or nullptr: then
  int64_t attention_factor_stride;        // elements to the next row of the batch; 0: shared
  int64_t attention_factor_group_stride;  // elements to the next group of heads; 0: shared
  double attention_factor;                // for every row
};

// Gradients of the angles and of the factor, with x the inputs q and k of the forward params:
//   A = sum over heads of x1 g2 - x2 g1,   B = sum over heads of x1 g1 + x2 g2
//   d/d phase = factor (A cos - B sin),    d/d factor = sum of B cos + A sin
// summed over the tokens of one block, in float64: d/d phase times the position goes to inv_freq,
// or to base_inv_freq below start_tokens. The caller adds up blocks (and rows that share
// frequencies).
struct RopeBackwardParams {
  RopeParams forward;         // q_out and k_out unused; only one of turn and undo
  RopeTensor grad_q, grad_k;  // gradients of the outputs
  // [groups, batch, blocks, 2 * pairs + 1]: inv_freq, base_inv_freq, factor
  double* partial;
};

// Work is cut into rope_blocks(params) blocks of tokens per row: items [0, blocks * batch), in any
// split over threads. The tables of cosines and sines of a block, one for each group of heads, are
// made once and used by all heads.
int64_t rope_blocks(const RopeParams& params);

// On a CUDA device: every pointer is device memory, `stream` a cudaStream_t. float64 is refused.
// Gradients come in rope_backward_cuda_blocks(params) blocks per row.
void rope_cuda(const RopeParams& params, void* stream);
void rope_backward_cuda(const RopeBackwardParams& params, void* stream);
int64_t rope_backward_cuda_blocks(const RopeBackwardParams& params);

// Cosines and sines of the tokens [begin, end) of the first row and group, times their factor:
// [end - begin, pairs] of float32 (float64 for float64).
void rope_table_cpu(const RopeParams& params, int64_t begin, int64_t end, void* cos, void* sin);

void rope_cpu(const RopeParams& params, int64_t begin, int64_t end);
void rope_backward_cpu(const RopeBackwardParams& params, int64_t begin, int64_t end);

}  // namespace longrope
