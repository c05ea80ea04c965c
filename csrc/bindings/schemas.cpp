// The schema of every op, in one place. Implementations register by dispatch key in the op's own
// file beside this one; autograd formulas are in longrope/ops/<op>.py, fake (meta) kernels in
// longrope/ops/_fake.
#include <torch/library.h>

TORCH_LIBRARY(longrope, m) {
  // rope. Frequencies [pairs], by row [B, pairs], or by row and group of heads [B or 1, groups,
  // pairs]; then attention_factor_rows may be [B or 1, groups]. `inverse` turns back by the same
  // angles (the gradient); the factor multiplies either way.
  m.def(
      "rope(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, Tensor? base_inv_freq, "
      "SymInt start_tokens, Tensor? start_tokens_rows, float attention_factor, "
      "Tensor? attention_factor_rows, bool interleaved, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "rope_(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor inv_freq, Tensor? base_inv_freq, "
      "SymInt start_tokens, Tensor? start_tokens_rows, float attention_factor, "
      "Tensor? attention_factor_rows, bool interleaved) -> ()");
  // Gradients for inv_freq, base_inv_freq [B, pairs] and the factor [B] of each row; those for
  // inv_freq and the factor [B, groups, pairs] and [B, groups] where inv_freq comes by group.
  m.def(
      "rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, "
      "Tensor inv_freq, Tensor? base_inv_freq, SymInt start_tokens, Tensor? start_tokens_rows, "
      "float attention_factor, Tensor? attention_factor_rows, bool interleaved, bool inverse) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "rerotate(Tensor k, Tensor positions, Tensor from_inv_freq, Tensor? from_base_inv_freq, "
      "SymInt from_start_tokens, Tensor to_inv_freq, Tensor? to_base_inv_freq, "
      "SymInt to_start_tokens, float attention_factor, Tensor? attention_factor_groups, "
      "bool interleaved) -> Tensor");
  m.def(
      "rerotate_out(Tensor k, Tensor positions, Tensor from_inv_freq, Tensor? from_base_inv_freq, "
      "SymInt from_start_tokens, Tensor to_inv_freq, Tensor? to_base_inv_freq, "
      "SymInt to_start_tokens, float attention_factor, Tensor? attention_factor_groups, "
      "bool interleaved, Tensor(a!) out) -> ()");
  m.def(
      "rerotate_(Tensor(a!) k, Tensor positions, Tensor from_inv_freq, Tensor? from_base_inv_freq, "
      "SymInt from_start_tokens, Tensor to_inv_freq, Tensor? to_base_inv_freq, "
      "SymInt to_start_tokens, float attention_factor, Tensor? attention_factor_groups, "
      "bool interleaved) -> ()");
  // Every row from a tier to a tier, in place; -1: not rotated.
  m.def(
      "rerotate_rows_(Tensor(a!) k, Tensor positions, Tensor from_tier, Tensor to_tier, "
      "Tensor inv_freq, Tensor? base_inv_freq, SymInt start_tokens, Tensor? start_tokens_tiers, "
      "float attention_factor, Tensor? attention_factor_tiers, bool interleaved) -> ()");

  // attention. Each bound comes for all rows of the batch, or as a tensor [B]. window 0 and softcap
  // 0 mean none.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, bool causal, SymInt query_start, "
      "Tensor? query_start_rows, SymInt key_start, Tensor? key_start_rows, SymInt key_length, "
      "Tensor? key_length_rows, SymInt query_begin, Tensor? query_begin_rows, SymInt query_end, "
      "Tensor? query_end_rows, SymInt window, float scale, float softcap) "
      "-> (Tensor out, Tensor lse)");
  // Queries and keys come un-rotated, the queries of each row in tiers: inv_freq [tiers, pairs],
  // start_tokens and attention_factor [tiers], or each by row [B, ...]; limits [tiers].
  m.def(
      "attention_rotated(Tensor q, Tensor k, Tensor v, bool causal, SymInt query_start, "
      "Tensor? query_start_rows, SymInt key_start, Tensor? key_start_rows, SymInt key_length, "
      "Tensor? key_length_rows, SymInt query_begin, Tensor? query_begin_rows, SymInt query_end, "
      "Tensor? query_end_rows, SymInt window, float scale, float softcap, Tensor query_positions, "
      "Tensor key_positions, Tensor? limits, Tensor inv_freq, Tensor? base_inv_freq, "
      "SymInt start_tokens, Tensor? start_tokens_tiers, float attention_factor, "
      "Tensor? attention_factor_tiers, bool interleaved) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor "
      "out, "
      "Tensor lse, bool causal, SymInt query_start, Tensor? query_start_rows, SymInt key_start, "
      "Tensor? key_start_rows, SymInt key_length, Tensor? key_length_rows, SymInt query_begin, "
      "Tensor? query_begin_rows, SymInt query_end, Tensor? query_end_rows, SymInt window, "
      "float scale, float softcap) -> (Tensor, Tensor, Tensor)");
  m.def(
      "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> (Tensor out, Tensor lse)");

  // linear_nll. stats [2, T]: the largest logit and the log of the sum relative to it.
  m.def(
      "linear_nll(Tensor hidden, Tensor weight, Tensor targets, int ignore_index=-100, "
      "float? softcap=None) -> (Tensor nll, Tensor stats)");
  m.def(
      "linear_nll_backward(Tensor grad_nll, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor stats, int ignore_index, float? softcap, bool need_hidden, bool need_weight) -> "
      "(Tensor grad_hidden, Tensor grad_weight)");
  // For a frozen head: nll, and its gradient for each row's hidden state, which the backward
  // scales. `edge` is a piece of hidden without elements: it ties the result to hidden's graph.
  m.def(
      "linear_nll_with_gradient(Tensor hidden, Tensor weight, Tensor targets, Tensor edge, "
      "int ignore_index=-100, float? softcap=None) -> (Tensor nll, Tensor gradient)");
  m.def(
      "linear_nll_scale(Tensor grad_nll, Tensor gradient, Tensor targets, Tensor edge, "
      "int ignore_index) -> Tensor");
  m.def(
      "candidate_sums(Tensor nll, Tensor targets, Tensor candidate, SymInt candidates, "
      "int ignore_index=-100) -> (Tensor sums, Tensor counts)");
}
