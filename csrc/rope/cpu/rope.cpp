#include "rope/cpu/rope.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "common/phase.h"

#define LONGROPE_BODY "rope/cpu/body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope {
namespace {

// Holds the buffers of a RopeScratch, each aligned to a cache line.
class Scratch {
 public:
  Scratch(const RopeParams& p, bool gradients) {
    const size_t value = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
    const size_t table = padded(rope_block_tokens(p) * p.pairs * value);
    const size_t row = padded(2 * p.pairs * value);
    const size_t turned = padded(p.head_dim * value);
    const size_t frequencies = padded(4 * p.pairs * sizeof(uint64_t));
    memory_.reset(new char[(gradients ? 4 : 2) * table + row + turned + frequencies + kLine]);
    char* next = memory_.get() + kLine - reinterpret_cast<uintptr_t>(memory_.get()) % kLine;
    const auto take = [&next](size_t bytes) {
      char* const taken = next;
      next += bytes;
      return taken;
    };
    buffers.cos = take(table);
    buffers.sin = take(table);
    buffers.row = take(row);
    buffers.turned = take(turned);
    buffers.frequencies = reinterpret_cast<uint64_t*>(take(frequencies));
    buffers.cross = gradients ? take(table) : nullptr;
    buffers.dot = gradients ? take(table) : nullptr;
  }

  RopeScratch buffers;

 private:
  static constexpr size_t kLine = 64;
  static size_t padded(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  std::unique_ptr<char[]> memory_;
};

}  // namespace

int64_t rope_blocks(const RopeParams& params) {
  const int64_t block = rope_block_tokens(params);
  return (params.tokens + block - 1) / block;
}

void rope_cpu(const RopeParams& params, int64_t begin, int64_t end) {
  Scratch scratch(params, false);
  LONGROPE_DISPATCH(rope)(params, scratch.buffers, begin, end);
#if defined(__x86_64__)
  _mm_sfence();  // streamed rows are seen by other threads only behind a fence
#endif
}

void rope_grad_cpu(const RopeGradParams& params, int64_t begin, int64_t end) {
  Scratch scratch(params.forward, true);
  LONGROPE_DISPATCH(rope_grad)(params, scratch.buffers, begin, end);
}

}  // namespace longrope
