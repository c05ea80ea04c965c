// Attention of a chunk of queries over a key/value cache, without the [queries, keys] matrix.
//
//   score(i, j) = softcap tanh(scale q_i . k_j / softcap)        softcap 0: scale q_i . k_j
//   out_i       = sum over visible j of exp(score(i, j) - lse_i) v_j
//   lse_i       = log of the sum over visible j of exp(score(i, j))
//
// Query i of row b sees key j when all of these hold (positions count from the first key):
//   key_start(b) <= j < key_length(b)
//   causal:   j <= query_start(b) + i
//   window w: j >  query_start(b) + i - w
//   i itself: query_begin(b) <= i < query_end(b)
// A query that sees no key gives out 0 and lse -inf. Keys and values that no query of the row sees
// are never used, nor are queries that see no key: they may hold NaN.
//
// Head h of the queries attends head h / (heads / kv_heads) of the keys and values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/product.h"
#include "rope/rope.h"

namespace longrope {

constexpr int kMaxHeadDim = 256;

// [batch, heads, tokens, head_dim] with stride 1 in head_dim; strides count elements.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Of every row of the batch: `rows` [batch] where given, else `all`.
struct AttentionBound {
  const int64_t* rows;
  int64_t all;

  int64_t operator[](int64_t b) const { return rows ? rows[b] : all; }
};

// How queries and keys that come un-rotated turn (rope.h): each query, and for it all its keys, by
// the first tier t with position < limits[t], by the last tier beyond. Positions of the queries
// that attend must not come back to an earlier tier along a row.
struct AttentionRotation {
  RopeParams q, k;        // but for their outputs, with no second tensor
  const int64_t* limits;  // [tiers], growing; nullptr where there is one tier
};

// CPU: how keys at consecutive positions turn where few queries attend them, without a table of
// them all. With turns t (common/phase.h) and a block of keys that begins at position s, the score
// of a query at position p and the key at s + j is that of the query turned by the phase p t - s t,
// which is exact, and the key turned by j t: one table for every block.
constexpr int64_t kOffsetKeys = 64;

struct AttentionOffsets {
  const uint64_t* query_phases;  // [queries, pairs]: of the row of the batch
  const uint64_t* key_turns;     // [2, pairs] per token: of the tier, and below its start tokens
  int64_t position;              // of key 0
  int64_t start_keys;            // keys before it stand below the start tokens
  double factor;
};

// CPU: cosines and sines, times the attention factor, that turn the tokens of one row of the batch
// as they are read. With `offsets`: [2, kOffsetKeys, pairs], of its key_turns times 0, 1, ...
struct AttentionTable {
  const void* cos;  // [tokens from `first` on, pairs] of float32 (float64 for float64); nullptr: no
  const void* sin;  // rotation
  int64_t first, pairs;
  bool interleaved;
  const AttentionOffsets* offsets;
};

// CPU: the queries of every row of the batch by tiers. cpu/tables.h makes them.
struct AttentionTiers {
  int64_t count;
  const int64_t* query_begin;     // [batch, count + 1]: tier t has queries [begin[t], begin[t + 1])
  const AttentionTable* queries;  // [batch], each query under its own tier
  const AttentionTable* keys;     // [batch, count], all with offsets or none
};

struct AttentionParams {
  AttentionTensor q;     // [batch, heads, queries, head_dim]
  AttentionTensor k, v;  // [batch, kv_heads, keys, head_dim]
  AttentionTensor out;   // as q
  void* lse;             // [batch, heads, queries] contiguous, natural logarithm; float32, or
                         // float64 where dtype is float64
  DType dtype;           // of q, k, v and out; accumulation in float32 (float64 for float64)
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  AttentionBound query_start;             // position of the first query, any value
  AttentionBound key_start, key_length;   // 0 ... keys
  AttentionBound query_begin, query_end;  // of the queries that attend, any values
  bool causal;
  int64_t window;  // 0: none
  double scale;
  double softcap;  // 0: none
  const AttentionRotation*
      rotation;                 // nullptr: queries and keys come as they are; else, on the CPU,
  const AttentionTiers* tiers;  // tables that make them turn
  Product bfloat16_product;     // CPU; nullptr: products are in float32
};

// Gradients of q, k and v from those of out and lse. With P = exp(score - lse):
//   dV = P^T dOut,  dP = dOut V^T,  dScore = P (dP - delta),  delta_i = dOut_i . out_i - dLse_i
//   dQ = scale dScore' K,  dK = scale dScore'^T Q,  dScore' = dScore (1 - (score / softcap)^2)
// The rotation must be none: the caller rotates (and differentiates the rotation) outside.
struct AttentionBackwardParams {
  AttentionParams forward;                 // with out and lse as computed
  AttentionTensor grad_out;                // as out
  const void* grad_lse;                    // as lse, contiguous; nullptr: zero
  AttentionTensor grad_q, grad_k, grad_v;  // written, all of them
};

// CPU. Work is cut into tasks that may run in any order on any thread; the result depends neither
// on the order nor on the number of threads. A task covers some rows of one key/value head, and
// where those are few, a part of the keys: then the parts are merged afterwards.
struct AttentionPlan {
  int64_t tasks;
  int64_t block_rows;  // of the rows (queries times heads that share keys) of one key/value head
  int64_t row_blocks;
  int64_t splits;  // of the keys, `split_keys` each
  int64_t split_keys;
  size_t scratch;          // bytes for every thread, aligned to 64
  size_t workspace;        // bytes for the call, aligned to 64; may be 0
  bool bfloat16_products;  // multiply by bfloat16_product
  bool streamed;           // few rows: read keys and values from where they lie
};

// Whether few queries share each key: then keys and values are read from where they lie, and keys
// that turn do so by offsets.
bool attention_streams(const AttentionParams& params);

AttentionPlan attention_plan(const AttentionParams& params);
void attention_cpu(const AttentionParams& params, const AttentionPlan& plan, int64_t task,
                   void* workspace, void* scratch);

// After all tasks, where plan.splits > 1: rows [begin, end) of the batch * heads * queries.
void attention_merge_splits_cpu(const AttentionParams& params, const AttentionPlan& plan,
                                const void* workspace, int64_t begin, int64_t end);

// Gradients: tasks as above, each of one key/value head and a part of its keys.
AttentionPlan attention_backward_plan(const AttentionParams& params);
void attention_backward_cpu(const AttentionBackwardParams& params, const AttentionPlan& plan,
                            int64_t task, void* workspace, void* scratch);

// After all tasks: grad_q of rows [begin, end) of the batch * heads * queries (in an order of its
// own).
void attention_backward_finish_cpu(const AttentionBackwardParams& params, const AttentionPlan& plan,
                                   const void* workspace, int64_t begin, int64_t end);

// The union of two disjoint key sets, from the attention of each:
//   lse = log(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
// A side with lse -inf has no part in out; both: 0 and -inf.
struct AttentionMergeParams {
  AttentionTensor out_a, out_b, out;
  const void *lse_a,
      *lse_b;  // [batch, heads, queries] contiguous; float32, or float64 where dtype is
  void* lse;
  DType dtype;  // of the outs
  int64_t batch, heads, queries, head_dim;
};

// Rows [begin, end) of the batch * heads * queries.
void attention_merge_cpu(const AttentionMergeParams& params, int64_t begin, int64_t end);

// On a CUDA device: every pointer is device memory (the rows of the bounds too, which are not
// checked there: keys are taken from those that exist), `stream` a cudaStream_t. float64 is
// refused. Workspaces have so many bytes, aligned to 128.
size_t attention_cuda_workspace(const AttentionParams& params);
void attention_cuda(const AttentionParams& params, void* workspace, void* stream);
size_t attention_backward_cuda_workspace(const AttentionBackwardParams& params);
void attention_backward_cuda(const AttentionBackwardParams& params, void* workspace, void* stream);
void attention_merge_cuda(const AttentionMergeParams& params, void* stream);

// Which kernels attend on CUDA, for tests and benchmarks: "wgmma" those of compute capability 9.0
// wherever device, build, dtype and (gradients: to 128) head_dim allow, "mma" never those, "auto"
// (at first) those where they are expected to be faster. Throws std::invalid_argument for others.
const char* attention_cuda_kernel();
// Whether this build has the kernels of compute capability 9.0 at all.
bool attention_cuda_has_wgmma();
void set_attention_cuda_kernel(const char* name);

}  // namespace longrope
