// The CUDA entry points of every op for Python (ctypes): each takes its params struct, returns null
// or the error.
#include <cstdint>
#include <exception>
#include <string>

#include "attention/attention.h"
#include "perplexity/perplexity.h"
#include "rope/rope.h"

namespace {

template <typename F>
const char* guarded(const F& f) {
  static std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

}  // namespace

extern "C" {

const char* emulated_rope(const longrope::RopeParams* params) {
  return guarded([&] { longrope::rope_cuda(*params, nullptr); });
}

const char* emulated_rope_backward(const longrope::RopeBackwardParams* params) {
  return guarded([&] { longrope::rope_backward_cuda(*params, nullptr); });
}

int64_t emulated_rope_backward_blocks(const longrope::RopeBackwardParams* params) {
  return longrope::rope_backward_cuda_blocks(*params);
}

int64_t emulated_attention_workspace(const longrope::AttentionParams* params) {
  return static_cast<int64_t>(longrope::attention_cuda_workspace(*params));
}

const char* emulated_attention(const longrope::AttentionParams* params, void* workspace) {
  return guarded([&] { longrope::attention_cuda(*params, workspace, nullptr); });
}

const char* emulated_set_attention_kernel(const char* name) {
  return guarded([&] { longrope::set_attention_cuda_kernel(name); });
}

int64_t emulated_attention_backward_workspace(const longrope::AttentionBackwardParams* params) {
  return static_cast<int64_t>(longrope::attention_backward_cuda_workspace(*params));
}

const char* emulated_attention_backward(const longrope::AttentionBackwardParams* params,
                                        void* workspace) {
  return guarded([&] { longrope::attention_backward_cuda(*params, workspace, nullptr); });
}

const char* emulated_attention_merge(const longrope::AttentionMergeParams* params) {
  return guarded([&] { longrope::attention_merge_cuda(*params, nullptr); });
}

const char* emulated_candidate_sums(const longrope::CandidateSumsParams* params) {
  return guarded([&] { longrope::candidate_sums_cuda(*params, nullptr); });
}

int64_t sizeof_AttentionParams() { return sizeof(longrope::AttentionParams); }
int64_t sizeof_AttentionBackwardParams() { return sizeof(longrope::AttentionBackwardParams); }
int64_t sizeof_AttentionRotation() { return sizeof(longrope::AttentionRotation); }
int64_t sizeof_AttentionMergeParams() { return sizeof(longrope::AttentionMergeParams); }
int64_t sizeof_CandidateSumsParams() { return sizeof(longrope::CandidateSumsParams); }
int64_t sizeof_RopeParams() { return sizeof(longrope::RopeParams); }
int64_t sizeof_RopeBackwardParams() { return sizeof(longrope::RopeBackwardParams); }

}  // extern "C"
