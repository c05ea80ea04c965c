// Fibers: the threads of a block, switched by hand on one operating-system thread.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

// A place where execution can be left and resumed: the scheduler's own stack, or a fiber's.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
  // What AddressSanitizer wants to know about the stack (unused without it).
  void* fake_stack = nullptr;
  const void* stack_low = nullptr;
  std::size_t stack_bytes = 0;
};

// Leaves `from` and continues `to`; returns when something switches back to `from`.
// `last` says that `from` will not be resumed.
void switch_context(Context& from, Context& to, bool last = false);

// One fiber with its own stack. The stack is reused by every start().
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to context() call entry() on a fresh stack. entry() must not return: it
  // ends with switch_context(..., /*last=*/true).
  void start(void (*entry)());
  Context& context() { return context_; }

 private:
  Context context_;
  char* mapping_ = nullptr;
};

// To be called first on every stack that a switch arrives at.
void arrived(Context& here, Context& came_from);

}  // namespace emulation
