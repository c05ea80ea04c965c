#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN 1
#endif

namespace emulation {
namespace {

#ifdef EMULATION_ASAN
constexpr std::size_t kStackBytes = 512 << 10;  // its frames carry red zones
#else
constexpr std::size_t kStackBytes = 128 << 10;
#endif
constexpr std::size_t kGuardBytes = 4096;  // a page that faults when a fiber runs out of stack

}  // namespace

#if defined(__x86_64__)

// Saves the registers that the System V ABI says a callee keeps, swaps stacks, restores them.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

#endif

void switch_context(Context& from, Context& to, bool last) {
#ifdef EMULATION_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_low, to.stack_bytes);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.saved, &to.saved);
#endif
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrived(Context& here, Context& came_from) {
#ifdef EMULATION_ASAN
  // The first arrival tells where the scheduler's stack lies, which switching back needs.
  __sanitizer_finish_switch_fiber(here.fake_stack, &came_from.stack_low, &came_from.stack_bytes);
#else
  (void)here;
  (void)came_from;
#endif
}

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  mprotect(mapping_, kGuardBytes, PROT_NONE);
  context_.stack_low = mapping_ + kGuardBytes;
  context_.stack_bytes = kStackBytes;
}

Fiber::~Fiber() { munmap(mapping_, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)()) {
  context_.fake_stack = nullptr;
#ifdef EMULATION_ASAN
  // The frames of a run that was abandoned after an error left their red zones behind.
  __asan_unpoison_memory_region(context_.stack_low, context_.stack_bytes);
#endif
#if defined(__x86_64__)
  // As if entry had been called: after the six pops and the ret, the stack is 8 off a multiple
  // of 16, and the return address of entry is null.
  auto** top = reinterpret_cast<void**>(mapping_ + kGuardBytes + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context_.stack_pointer = top;
#else
  getcontext(&context_.saved);
  context_.saved.uc_stack.ss_sp = mapping_ + kGuardBytes;
  context_.saved.uc_stack.ss_size = kStackBytes;
  context_.saved.uc_link = nullptr;
  makecontext(&context_.saved, entry, 0);
#endif
}

}  // namespace emulation
