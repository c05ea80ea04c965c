// Runs CUDA kernels on the CPU for the tests: one block at a time, its threads as fibers.
//
// This is a checker, not a backend. A primitive that joins threads (barrier, shuffle, mma, ...) is
// a collective that the last arriver completes over the lanes that have not exited; every misuse
// that hardware would answer with a hang or with garbage stops the launch with a report instead.
// csrc/common/cuda/ builds its C++ twins on the functions below; kernels never see them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulation {

// Where in the kernel's source a primitive was called, for the reports.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// The order in which the threads of a block, and the blocks of the grid, take turns. A kernel whose
// result depends on it has a race. kForward and kReverse run one warp as far as it goes before the
// next; kShuffle picks a random thread at every turn.
enum class Order { kForward, kReverse, kShuffle };
void set_order(Order order, unsigned seed);

// The compute capability whose shared memory launches get, 10 times major plus minor. The first one
// is 86, whose blocks get the least of all that are supported.
void set_capability(int capability);
int capability();
std::size_t most_shared_bytes();

struct Launch {
  const char* kernel;  // its name, for the reports
  Index3 grid, block;
  std::size_t dynamic_shared_bytes;
};

// Runs `body` once for every thread of the grid. Throws std::runtime_error with the report when the
// launch is invalid, deadlocks or misuses a primitive.
void run_grid(const Launch& launch, const std::function<void()>& body);

// The name of the kernel that ran last.
const char* last_kernel();

// --- for the twins; each is called by a running kernel thread ------------------------------------

// Ends the launch with `what`, the calling thread and its site.
[[noreturn]] void fail(const std::string& what, Site site);

// Blocks until every lane of `mask` that has not exited is here; the last one runs
// complete(arguments, present): one pointer per lane, null where absent.
void join_warp(const char* primitive, std::uint32_t mask, void* argument,
               void (*complete)(void** arguments, std::uint32_t present), Site site);

// Barrier `id` (0 .. 15). count 0: every thread of the block that has not exited, all from the same
// site; otherwise that many threads. wait false: count this thread and go on (bar.arrive).
void join_block(const char* primitive, int id, int count, bool wait, Site site);

// cp.async: `bytes` (4, 8 or 16) are written at `shared`, the first `source_bytes` of them from
// `global`, the rest zero. The destination is poison until a wait of the same thread copies it.
void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site site);
void commit_copies();
void wait_copies(int pending_groups);  // until at most that many committed groups are pending

// The shared array that belongs to the address `tag` in this block; poison when first asked for.
void* static_shared(const void* tag, std::size_t bytes);
void* dynamic_shared();

// Fails unless [pointer, pointer + bytes) is aligned to `bytes` (and inside shared memory).
void check_aligned(const void* pointer, int bytes, const char* primitive, Site site);
void check_shared(const void* pointer, int bytes, const char* primitive, Site site);

// The lane of the calling thread in its warp, and its number in the block.
int lane();
int thread_number();

// Gives the processor back until another thread wakes the calling one, which waits at `primitive`.
void sleep_thread(const char* primitive, Site site);
void wake_thread(int number);

// "kernel <name>, block <index>: ", as reports begin.
std::string block_text();

// What unwritten shared memory holds: NaN in every floating-point type.
constexpr int kPoisonByte = 0xFF;

}  // namespace emulation

extern emulation::Index3 threadIdx, blockIdx, blockDim, gridDim;
