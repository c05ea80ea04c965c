// The launchers that csrc/attention/cuda/attention.cu puts together. Each chooses its kernel by
// p.dtype and p.head_dim.
#pragma once

#include "attention/cuda/splits.cuh"

namespace longrope::cuda {

// Calls f(head_dim) with the smallest instantiation that holds p.head_dim.
template <typename F>
auto for_head_dim(int64_t head_dim, const F& f) {
  if (head_dim <= 64) return f(std::integral_constant<int, 64>());
  if (head_dim <= 96) return f(std::integral_constant<int, 96>());
  if (head_dim <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, kMaxHeadDim>());  // more is refused by check_sizes
}

// Whether rows of `x`, 16-bit elements, can be read and written 16 bytes at a time.
inline bool is_packed(const AttentionTensor& x, const AttentionParams& p) {
  return packs<bf16>(x) && p.head_dim % 8 == 0;
}

// Forward, of the queries that attend: what others have in out and lse stays. bf16 and f16: rows of
// q, k and v begin and end at multiples of 16 bytes, with zeros behind head_dim. q and k as they
// are.
void forward_16_bit(const AttentionParams& p, const Splits& splits, cudaStream_t stream);
int forward_16_bit_splits(const AttentionParams& p);
void forward_float(const AttentionParams& p, const Splits& splits, cudaStream_t stream);
int forward_float_splits(const AttentionParams& p);

// The same for 16-bit elements on compute capability 9.0, where dimensions of q, k and v with more
// than one element have strides other than 0 (sm90/forward.cu).
void forward_sm90(const AttentionParams& p, cudaStream_t stream);

// The same for a few rows of 16-bit elements over many keys. With a table k comes un-rotated and
// turns there.
constexpr int kDecodeRows = 16;  // queries times heads that share keys, at most
struct KeyTable {
  const float* data;  // [batch, keys, cosines and then sines of `pairs`]; nullptr: k as it is
  int64_t keys;
  int pairs;  // a multiple of 8
  bool interleaved;

  __device__ __forceinline__ const float* row(int64_t batch, int64_t key) const {
    return data + (batch * keys + key) * 2 * pairs;
  }
};
void decode(const AttentionParams& p, const Splits& splits, const KeyTable& table,
            cudaStream_t stream);
int decode_splits(const AttentionParams& p);

// Fills `out`, the memory of table.data, for the tokens of each row that turn.
void fill_key_table(const RopeParams& k, const KeyTable& table, float* out, cudaStream_t stream);

// out and lse from those of the parts.
void merge_splits(const AttentionParams& p, const Splits& splits, cudaStream_t stream);

// The queries that do not attend.
void write_idle(const AttentionParams& p, cudaStream_t stream);

// out = x, 16-bit elements, apart: [batch, heads, tokens, columns], and zeros up to `width`
// columns.
struct Copy {
  AttentionTensor x, out;
  int64_t batch, heads, tokens, columns, width;
};
void copy(const Copy& copy, cudaStream_t stream);

// A rotation in tiers takes `count` steps, in each of which a row of the batch has one tier or
// none: its queries and the keys that they see. [count, batch]
struct Steps {
  int64_t *query_begin, *query_end, *key_begin, *key_end, *tier;
};
void plan_steps(const AttentionParams& p, const Steps& steps, int count, cudaStream_t stream);

// What the gradient of a row needs of the forward pass, [batch, heads, queries].
struct RowTerms {
  float* log2_sum;  // lse in powers of two; +inf for rows whose lse is -inf: their weights are 0
  float* delta;     // dOut . out - dLse; 0 for those rows
};
void row_terms(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream);

// Gradients of the keys and values, and of the queries. Alignment as in the forward pass, of
// grad_out too.
void grad_keys_16_bit(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream);
void grad_queries_16_bit(const AttentionBackwardParams& g, const RowTerms& terms,
                         cudaStream_t stream);
// The same on compute capability 9.0 for head_dim to 128, where dimensions of q, k, v and grad_out
// with more than one element have strides other than 0 (sm90/grad_keys.cu, sm90/grad_queries.cu).
void grad_keys_sm90(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream);
void grad_queries_sm90(const AttentionBackwardParams& g, const RowTerms& terms,
                       cudaStream_t stream);
void grad_float(const AttentionBackwardParams& g, const RowTerms& terms, cudaStream_t stream);

}  // namespace longrope::cuda
