// The forward and the backward pass on a CUDA device: copy what is not aligned, turn q and k,
// attend, join the parts. Which kernels run and how much workspace they need depends on the shapes
// and strides, and on whether the device and the build have the kernels of 9.0.
//
// Why q and k turn apart from the attention kernel where there are many rows: every block of rows
// would turn every key again, and keys are read by many blocks. The price is one pass over q and k.
// A few queries read every key once (decode.cu) and turn it there. Rotations in tiers take a step
// for each tier (tiers.cu); blocks of rows that have no part in a step leave at once.
#include <atomic>
#include <cstring>

#include "attention/cuda/kernels.cuh"
#include "attention/cuda/workspace.cuh"

namespace longrope {
namespace cuda {
namespace {

constexpr const char* kChoices[] = {"auto", "mma", "wgmma"};
std::atomic<int> choice{0};

// Which kernel attends.
enum class Kernel { kFloat, kManyRows, kFewRows, kSm90 };

#if defined(LONGROPE_SM90) || !defined(__CUDACC__)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

// Whether this build and the device at hand have sm90/forward.cu.
bool has_sm90() { return kHasSm90 && capability() == 90; }

// Whether its blocks, which take 128 queries of one head, are filled, and enough of them to keep
// half of the 132 multiprocessors of an H100 busy: beyond that it gains more than parts of the keys
// for all of them would.
bool fills_sm90(const AttentionParams& p) {
  return p.queries >= 128 && ceil_div<int64_t>(p.queries, 128) * p.heads * p.batch >= 66;
}

// Whether to take the kernels of 9.0, whose blocks the shapes fill or not.
bool takes_sm90(const AttentionParams& p, bool fills) {
  const std::string chosen = kChoices[choice];
  return chosen != "mma" && p.keys > 0 && has_sm90() && (chosen == "wgmma" || fills);
}

Kernel kernel_for(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32) return Kernel::kFloat;
  if (takes_sm90(p, fills_sm90(p))) return Kernel::kSm90;
  const int64_t rows = p.queries * (p.heads / p.kv_heads);
  return rows <= kDecodeRows ? Kernel::kFewRows : Kernel::kManyRows;
}

// Whether the blocks of sm90/grad_keys.cu are filled, which take 128 keys of one key/value head and
// 64 queries of one head at a time, and enough of them as above.
bool fills_sm90_grads(const AttentionParams& p) {
  return p.queries >= 64 && ceil_div<int64_t>(p.keys, 128) * p.kv_heads * p.batch >= 66;
}

// Which kernels differentiate: those of 9.0 hold head_dim to 128.
Kernel grad_kernel_for(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32) return Kernel::kFloat;
  return p.head_dim <= 128 && takes_sm90(p, fills_sm90_grads(p)) ? Kernel::kSm90
                                                                 : Kernel::kManyRows;
}

// Whether tiles can be copied by a tensor map, which knows no elements that several places share.
bool is_apart(const AttentionTensor& x, const AttentionParams& p, int64_t heads, int64_t tokens) {
  return (x.batch_stride != 0 || p.batch == 1) && (x.head_stride != 0 || heads == 1) &&
         (x.token_stride != 0 || tokens == 1);
}

// Lays out the workspace and, unless `run` is false, launches what fills it.
class Preparation {
 public:
  Preparation(const AttentionParams& p, Kernel kernel, void* memory, cudaStream_t stream, bool run)
      : workspace(memory), p_(p), kernel_(kernel), stream_(stream), run_(run) {}

  // `x` aligned as the kernels read it.
  AttentionTensor aligned(const AttentionTensor& x, int64_t heads, int64_t tokens) {
    const bool apart = kernel_ != Kernel::kSm90 || is_apart(x, p_, heads, tokens);
    if (reads_as_is(x, p_) && apart) return x;
    const AttentionTensor out = workspace.heads(p_, heads, tokens);
    if (run_) copy({x, out, p_.batch, heads, tokens, p_.head_dim, read_columns(p_)}, stream_);
    return out;
  }

  // Room for turned tokens; what is read behind a row is zero.
  AttentionTensor turned(int64_t heads, int64_t tokens) {
    const AttentionTensor out = workspace.heads(p_, heads, tokens);
    const int64_t behind = read_columns(p_) - p_.head_dim;
    if (run_ && behind > 0) {
      AttentionTensor rest = out;
      rest.data = static_cast<uint16_t*>(out.data) + p_.head_dim;
      copy({rest, rest, p_.batch, heads, tokens, 0, behind}, stream_);
    }
    return out;
  }

  Workspace workspace;

 private:
  const AttentionParams& p_;
  Kernel kernel_;
  cudaStream_t stream_;
  bool run_;
};

// The tokens of a step and their tier.
RopeParams of_step(RopeParams rope, const int64_t* begin, const int64_t* end, const int64_t* tier) {
  rope.token_begin_rows = begin;
  rope.token_end_rows = end;
  rope.turn.tier_rows = tier;
  return rope;
}

void turn(RopeParams rope, const AttentionTensor& out, cudaStream_t stream) {
  rope.q_out = {out.data, rope.q.heads, out.batch_stride, out.head_stride, out.token_stride};
  rope_cuda(rope, stream);
}

int splits_for(Kernel kernel, const AttentionParams& p) {
  if (kernel == Kernel::kFloat) return forward_float_splits(p);
  if (kernel == Kernel::kSm90) return 1;
  return kernel == Kernel::kFewRows ? decode_splits(p) : forward_16_bit_splits(p);
}

void attend(Kernel kernel, const AttentionParams& p, const Splits& splits, const KeyTable& table,
            cudaStream_t stream) {
  if (kernel == Kernel::kFloat) forward_float(p, splits, stream);
  if (kernel == Kernel::kManyRows) forward_16_bit(p, splits, stream);
  if (kernel == Kernel::kFewRows) decode(p, splits, table, stream);
#if defined(LONGROPE_SM90) || !defined(__CUDACC__)
  if (kernel == Kernel::kSm90) forward_sm90(p, stream);
#endif
  if (splits.count > 1) merge_splits(p, splits, stream);
}

void differentiate(Kernel kernel, const AttentionBackwardParams& g, const RowTerms& terms,
                   cudaStream_t stream) {
  if (kernel == Kernel::kFloat) grad_float(g, terms, stream);
  if (kernel == Kernel::kManyRows) {
    grad_keys_16_bit(g, terms, stream);
    grad_queries_16_bit(g, terms, stream);
  }
#if defined(LONGROPE_SM90) || !defined(__CUDACC__)
  if (kernel == Kernel::kSm90) {
    grad_keys_sm90(g, terms, stream);
    grad_queries_sm90(g, terms, stream);
  }
#endif
}

// Both return the bytes of the workspace.
size_t forward(AttentionParams p, void* memory, cudaStream_t stream, bool run) {
  const AttentionParams given = p;
  const Kernel kernel = kernel_for(p);
  Preparation prepare(given, kernel, memory, stream, run);
  Workspace& workspace = prepare.workspace;
  // Eight pairs turn at once where the keys are read.
  const bool turns_inside =
      p.rotation && kernel == Kernel::kFewRows && p.rotation->k.pairs % 8 == 0;
  p.v = prepare.aligned(given.v, p.kv_heads, p.keys);
  p.q = p.rotation ? prepare.turned(p.heads, p.queries)
                   : prepare.aligned(given.q, p.heads, p.queries);
  p.k = p.rotation && !turns_inside ? prepare.turned(p.kv_heads, p.keys)
                                    : prepare.aligned(given.k, p.kv_heads, p.keys);
  KeyTable table{};
  float* sines = nullptr;
  if (turns_inside) {
    const RopeParams& k = p.rotation->k;
    sines = workspace.take<float>(p.batch * p.keys * 2 * k.pairs);
    table = {sines, p.keys, static_cast<int>(k.pairs), k.interleaved};
  }
  Splits splits{splits_for(kernel, p), nullptr, nullptr};
  const int64_t rows = splits.count > 1 ? splits.count * p.batch * p.heads * p.queries : 0;
  splits.out = workspace.take<float>(rows * p.head_dim);
  splits.lse = workspace.take<float>(rows);
  // Of a row's tiers no more have queries than it has queries.
  const int64_t count = p.rotation ? std::min(p.rotation->q.turn.tiers, p.queries) : 0;
  Steps steps{};
  for (int64_t** x :
       {&steps.query_begin, &steps.query_end, &steps.key_begin, &steps.key_end, &steps.tier}) {
    *x = workspace.take<int64_t>(count * p.batch);
  }
  if (!run) return workspace.bytes();

  write_idle(p, stream);
  if (!p.rotation) attend(kernel, p, splits, table, stream);
  if (p.rotation) plan_steps(p, steps, static_cast<int>(count), stream);
  for (int64_t at = 0; at < count * p.batch; at += p.batch) {
    const int64_t* const tier = steps.tier + at;
    const RopeParams k = of_step(p.rotation->k, steps.key_begin + at, steps.key_end + at, tier);
    p.query_begin.rows = steps.query_begin + at;
    p.query_end.rows = steps.query_end + at;
    turn(of_step(p.rotation->q, p.query_begin.rows, p.query_end.rows, tier), p.q, stream);
    turns_inside ? fill_key_table(k, table, sines, stream) : turn(k, p.k, stream);
    attend(kernel, p, splits, table, stream);
  }
  return workspace.bytes();
}

size_t backward(AttentionBackwardParams g, void* memory, cudaStream_t stream, bool run) {
  const AttentionBackwardParams given = g;
  const AttentionParams& p = given.forward;
  const Kernel kernel = grad_kernel_for(p);
  Preparation prepare(p, kernel, memory, stream, run);
  g.forward.q = prepare.aligned(p.q, p.heads, p.queries);
  g.forward.k = prepare.aligned(p.k, p.kv_heads, p.keys);
  g.forward.v = prepare.aligned(p.v, p.kv_heads, p.keys);
  g.grad_out = prepare.aligned(given.grad_out, p.heads, p.queries);
  const int64_t rows = p.batch * p.heads * p.queries;
  RowTerms terms{};
  terms.log2_sum = prepare.workspace.take<float>(rows);
  terms.delta = prepare.workspace.take<float>(rows);
  if (run) {
    row_terms(g, terms, stream);
    differentiate(kernel, g, terms, stream);
  }
  return prepare.workspace.bytes();
}

}  // namespace
}  // namespace cuda

bool attention_cuda_has_wgmma() { return cuda::kHasSm90; }

const char* attention_cuda_kernel() { return cuda::kChoices[cuda::choice]; }

void set_attention_cuda_kernel(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, cuda::kChoices[i]) == 0) {
      cuda::choice = i;
      return;
    }
  }
  throw std::invalid_argument(std::string("kernel: expected auto, mma or wgmma, got \"") + name +
                              "\"");
}

size_t attention_cuda_workspace(const AttentionParams& p) {
  cuda::check_sizes(p);
  return cuda::is_empty(p) ? 0 : cuda::forward(p, nullptr, nullptr, false);
}

void attention_cuda(const AttentionParams& p, void* workspace, void* stream) {
  cuda::check_sizes(p);
  if (!cuda::is_empty(p)) cuda::forward(p, workspace, static_cast<cudaStream_t>(stream), true);
}

size_t attention_backward_cuda_workspace(const AttentionBackwardParams& g) {
  cuda::check_sizes(g.forward);
  return cuda::is_empty(g.forward) ? 0 : cuda::backward(g, nullptr, nullptr, false);
}

void attention_backward_cuda(const AttentionBackwardParams& g, void* workspace, void* stream) {
  cuda::check_sizes(g.forward);
  if (cuda::is_empty(g.forward) || g.forward.keys == 0) return;
  cuda::backward(g, workspace, static_cast<cudaStream_t>(stream), true);
}

}  // namespace longrope
