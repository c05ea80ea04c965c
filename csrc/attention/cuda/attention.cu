// The forward and the backward pass on a CUDA device: turn q and k (and copy what is not aligned),
// attend, join the parts. Which kernels run and how much workspace they need depends on the
// parameters alone.
#include "attention/cuda/kernels.cuh"
#include "attention/cuda/workspace.cuh"

namespace longrope {
namespace cuda {
namespace {

// Lays out the workspace and, unless `run` is false, launches what fills it.
class Preparation {
 public:
  Preparation(const AttentionParams& p, void* memory, cudaStream_t stream, bool run)
      : workspace(memory), p_(p), stream_(stream), run_(run) {}

  // `x` as the kernels read it: turned, and aligned.
  AttentionTensor read(const AttentionTensor& x, const AttentionRotation& rotation, int64_t heads,
                       int64_t tokens) {
    if (!rotation.cos && reads_as_is(x, p_.dtype)) return x;
    const AttentionTensor out = workspace.heads(p_, heads, tokens);
    if (run_) turn({x, out, rotation, p_.batch, heads, tokens, p_.head_dim}, p_.dtype, stream_);
    return out;
  }

  void inputs(AttentionParams& p) {
    p.q = read(p_.q, p_.rotate_q, p_.heads, p_.queries);
    p.k = read(p_.k, p_.rotate_k, p_.kv_heads, p_.keys);
    p.v = read(p_.v, {}, p_.kv_heads, p_.keys);
    p.rotate_q = p.rotate_k = {};
  }

  Workspace workspace;

 private:
  const AttentionParams& p_;
  cudaStream_t stream_;
  bool run_;
};

// Both return the bytes of the workspace.
size_t forward(AttentionParams p, void* memory, cudaStream_t stream, bool run) {
  const AttentionParams given = p;
  const bool is_float = p.dtype == DType::kFloat32;
  Preparation prepare(given, memory, stream, run);
  prepare.inputs(p);
  Splits splits{is_float ? forward_float_splits(p) : forward_16_bit_splits(p), nullptr, nullptr};
  const int64_t rows = splits.count > 1 ? splits.count * p.batch * p.heads * p.queries : 0;
  splits.out = prepare.workspace.take<float>(rows * p.head_dim);
  splits.lse = prepare.workspace.take<float>(rows);
  if (run) {
    is_float ? forward_float(p, splits, stream) : forward_16_bit(p, splits, stream);
    if (splits.count > 1) merge_splits(p, splits, stream);
  }
  return prepare.workspace.bytes();
}

size_t backward(AttentionGradParams g, void* memory, cudaStream_t stream, bool run) {
  const AttentionGradParams given = g;
  const AttentionParams& p = given.forward;
  Preparation prepare(p, memory, stream, run);
  prepare.inputs(g.forward);
  g.grad_out = prepare.read(given.grad_out, {}, p.heads, p.queries);
  const int64_t rows = p.batch * p.heads * p.queries;
  RowTerms terms{};
  terms.log2_sum = prepare.workspace.take<float>(rows);
  terms.delta = prepare.workspace.take<float>(rows);
  if (run) {
    row_terms(g, terms, stream);
    if (p.dtype == DType::kFloat32) {
      grad_float(g, terms, stream);
    } else {
      grad_keys_16_bit(g, terms, stream);
      grad_queries_16_bit(g, terms, stream);
    }
  }
  return prepare.workspace.bytes();
}

}  // namespace
}  // namespace cuda

size_t attention_cuda_workspace(const AttentionParams& p) {
  cuda::check_sizes(p);
  return cuda::is_empty(p) ? 0 : cuda::forward(p, nullptr, nullptr, false);
}

void attention_cuda(const AttentionParams& p, void* workspace, void* stream) {
  cuda::check_sizes(p);
  if (!cuda::is_empty(p)) cuda::forward(p, workspace, static_cast<cudaStream_t>(stream), true);
}

size_t attention_grad_cuda_workspace(const AttentionGradParams& g) {
  cuda::check_sizes(g.forward);
  return cuda::is_empty(g.forward) ? 0 : cuda::backward(g, nullptr, nullptr, false);
}

void attention_grad_cuda(const AttentionGradParams& g, void* workspace, void* stream) {
  cuda::check_sizes(g.forward);
  if (cuda::is_empty(g.forward) || g.forward.keys == 0) return;
  cuda::backward(g, workspace, static_cast<cudaStream_t>(stream), true);
}

}  // namespace longrope
