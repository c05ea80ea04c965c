#include "emulation/runtime.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/warpgroup.h"

emulation::Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kBarriers = 16;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kMaxStaticBytes = 48 << 10;

// Shared memory of a block by compute capability, static arrays included (CUDA programming guide,
// table of compute capabilities).
std::size_t shared_bytes_of(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
      return 227 << 10;
    default:  // 86, 89, 120
      return 99 << 10;
  }
}

struct Copy {
  char* shared;
  const char* global;
  int bytes, source_bytes;
};

enum class State { kReady, kWaiting, kExited };

struct Thread {
  Fiber fiber;
  Index3 index;
  int number = 0;
  State state = State::kExited;
  const char* primitive = nullptr;  // where it waits
  Site site{};
  std::vector<Copy> open;                // copies issued since the last commit
  std::deque<std::vector<Copy>> groups;  // committed and not waited for, oldest first
};

// A warp collective that some lanes have reached and others have not.
struct Pending {
  const char* primitive;
  std::uint32_t mask, present;
  Site site;
  void (*complete)(void**, std::uint32_t);
  void* arguments[kWarp];
};

struct Warp {
  std::uint32_t exited = 0;
  std::vector<Pending> pending;
};

struct Barrier {
  const char* primitive = nullptr;
  int count = 0, arrived = 0;
  Site site{};
  std::vector<Thread*> waiting;
};

struct Array {
  std::unique_ptr<char[]> memory;
  std::size_t bytes = 0;
  char* data() const {  // 128-byte aligned, as the device's shared memory is
    auto address = reinterpret_cast<std::uintptr_t>(memory.get());
    return reinterpret_cast<char*>((address + 127) & ~std::uintptr_t{127});
  }
};

Array poisoned(std::size_t bytes) {
  Array array;
  // Two paddings of 127 at most: alignment before, poison behind, so that a read past the end gives
  // poison too (and under AddressSanitizer soon a report).
  array.memory = std::make_unique<char[]>(bytes + 254);
  array.bytes = bytes;
  std::memset(array.memory.get(), kPoisonByte, bytes + 254);
  return array;
}

struct State_ {
  std::mutex mutex;  // one launch at a time
  Order order = Order::kForward;
  unsigned seed = 0;
  int capability = 86;  // the least shared memory
  const Launch* launch = nullptr;
  std::string last;  // kernel that was launched
  const std::function<void()>* body = nullptr;
  Context scheduler;
  std::vector<std::unique_ptr<Thread>> threads;  // of the running block; reused
  int count = 0, alive = 0;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  Array dynamic;
  std::map<const void*, Array> statics;
  Thread* current = nullptr;
  std::string error;
  std::minstd_rand random;
};

State_& g() {
  static State_ state;
  return state;
}

Warp& warp_of(const Thread& thread) { return g().warps[thread.number / kWarp]; }
std::uint32_t bit_of(const Thread& thread) { return 1u << (thread.number % kWarp); }

std::string text(const Index3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

void wake(Thread& thread) { thread.state = State::kReady; }

// Gives the processor back until another thread wakes this one.
void sleep(Thread& thread, const char* primitive, Site site) {
  thread.state = State::kWaiting;
  thread.primitive = primitive;
  thread.site = site;
  switch_context(thread.fiber.context(), g().scheduler);
}

// Completes the collective at `index` if every lane that can still come is there.
bool try_complete(Warp& warp, std::size_t index, Thread* arriver) {
  Pending p = warp.pending[index];
  if (p.present != (p.mask & ~warp.exited)) return false;
  warp.pending.erase(warp.pending.begin() + static_cast<std::ptrdiff_t>(index));
  if (p.present) p.complete(p.arguments, p.present);
  const int first = static_cast<int>(&warp - g().warps.data()) * kWarp;
  for (int i = 0; i < kWarp; ++i) {
    Thread* thread = p.present >> i & 1 ? g().threads[first + i].get() : nullptr;
    if (thread && thread != arriver) wake(*thread);
  }
  return true;
}

bool try_release(Barrier& barrier) {
  if (barrier.arrived == 0) return false;
  if (barrier.arrived < (barrier.count ? barrier.count : g().alive)) return false;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier = Barrier();
  return true;
}

void thread_main() {
  State_& s = g();
  Thread& thread = *s.current;
  arrived(thread.fiber.context(), s.scheduler);
  (*s.body)();
  thread.state = State::kExited;
  thread.open.clear();
  thread.groups.clear();
  --s.alive;
  Warp& warp = warp_of(thread);
  warp.exited |= bit_of(thread);
  // Others may have been waiting for this thread alone.
  for (std::size_t i = warp.pending.size(); i-- > 0;) try_complete(warp, i, nullptr);
  for (Barrier& barrier : s.barriers) {
    if (barrier.count == 0) try_release(barrier);
  }
  switch_context(thread.fiber.context(), s.scheduler, /*last=*/true);
}

bool run(Thread& thread) {
  State_& s = g();
  if (thread.state != State::kReady) return false;
  s.current = &thread;
  threadIdx = thread.index;
  switch_context(s.scheduler, thread.fiber.context());
  if (!s.error.empty()) throw std::runtime_error(s.error);
  return true;
}

[[noreturn]] void report_deadlock() {
  State_& s = g();
  std::string report = block_text() + "deadlock";
  std::vector<std::pair<Thread*, int>> groups;  // threads that wait at the same place
  for (int i = 0; i < s.count; ++i) {
    Thread* t = s.threads[i].get();
    if (t->state != State::kWaiting) continue;
    auto same_place = [&](auto& group) {
      return same(group.first->primitive, t->primitive) && same(group.first->site, t->site);
    };
    auto found = std::find_if(groups.begin(), groups.end(), same_place);
    if (found == groups.end()) {
      groups.emplace_back(t, 1);
    } else {
      ++found->second;
    }
  }
  for (auto& [thread, count] : groups) {
    report += "; thread " + text(thread->index);
    if (count > 1) report += " and " + std::to_string(count - 1) + " more";
    report += std::string(" at ") + thread->primitive + " (" + text(thread->site) + ")";
  }
  report += "; " + std::to_string(s.count - s.alive) + " exited";
  throw std::runtime_error(report);
}

// Runs one warp until all its lanes wait or have exited.
bool run_warp(int warp, bool backwards) {
  State_& s = g();
  const int first = warp * kWarp, lanes = std::min(kWarp, s.count - first);
  bool any = false, again = true;
  while (again) {
    again = false;
    for (int i = 0; i < lanes; ++i) {
      again |= run(*s.threads[first + (backwards ? lanes - 1 - i : i)]);
    }
    any |= again;
  }
  return any;
}

bool run_random_thread() {
  State_& s = g();
  const unsigned start = s.random() % s.count;
  for (int i = 0; i < s.count; ++i) {
    if (run(*s.threads[(start + i) % s.count])) return true;
  }
  return false;
}

void run_block() {
  State_& s = g();
  const Index3 b = s.launch->block;
  s.count = s.alive = static_cast<int>(b.x * b.y * b.z);
  s.warps.assign((s.count + kWarp - 1) / kWarp, Warp());
  if (s.count % kWarp) s.warps.back().exited = ~0u << (s.count % kWarp);
  for (Barrier& barrier : s.barriers) barrier = Barrier();
  s.dynamic = poisoned(s.launch->dynamic_shared_bytes);
  s.statics.clear();
  s.error.clear();
  while (static_cast<int>(s.threads.size()) < s.count) {
    s.threads.push_back(std::make_unique<Thread>());
  }
  for (int i = 0; i < s.count; ++i) {
    Thread& t = *s.threads[i];
    const auto n = static_cast<unsigned>(i);
    t.index = {n % b.x, n / b.x % b.y, n / (b.x * b.y)};
    t.number = i;
    t.state = State::kReady;
    t.open.clear();
    t.groups.clear();
    t.fiber.start(thread_main);
  }
  begin_block();
  while (s.alive > 0) {
    bool progress = false;
    if (s.order == Order::kShuffle) {
      progress = run_random_thread();
    } else {
      const bool backwards = s.order == Order::kReverse;
      const int warps = static_cast<int>(s.warps.size());
      for (int w = 0; w < warps; ++w) {
        progress |= run_warp(backwards ? warps - 1 - w : w, backwards);
      }
    }
    if (!progress) report_deadlock();
  }
  for (const Barrier& barrier : s.barriers) {
    if (barrier.arrived > 0) {
      throw std::runtime_error(block_text() + barrier.primitive + " (" + text(barrier.site) +
                               "): nobody waited for it");
    }
  }
  end_block();
}

void check_launch(const Launch& launch) {
  const Index3 &g = launch.grid, &b = launch.block;
  const std::string name = std::string("kernel ") + launch.kernel + ": ";
  if (b.x == 0 || b.y == 0 || b.z == 0 || b.z > 64 ||
      std::uint64_t{b.x} * b.y * b.z > kMaxThreads) {
    throw std::runtime_error(name + "block " + text(b) + " is not within 1024 threads");
  }
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535) {
    throw std::runtime_error(name + "grid " + text(g) + " is not within (2^31 - 1, 65535, 65535)");
  }
  if (launch.dynamic_shared_bytes > most_shared_bytes()) {
    throw std::runtime_error(name + std::to_string(launch.dynamic_shared_bytes) +
                             " bytes of shared memory, more than the device has");
  }
}

}  // namespace

void set_order(Order order, unsigned seed) {
  std::lock_guard<std::mutex> lock(g().mutex);
  g().order = order;
  g().seed = seed;
}

const char* last_kernel() { return g().last.c_str(); }
void set_capability(int capability) { g().capability = capability; }
int capability() { return g().capability; }
std::size_t most_shared_bytes() { return shared_bytes_of(g().capability); }

void run_grid(const Launch& launch, const std::function<void()>& body) {
  State_& s = g();
  std::lock_guard<std::mutex> lock(s.mutex);
  check_launch(launch);
  s.launch = &launch;
  s.last = launch.kernel;
  s.body = &body;
  s.random.seed(s.seed + 1);
  gridDim = launch.grid;
  blockDim = launch.block;
  const std::uint64_t blocks = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::vector<std::uint64_t> sequence(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) sequence[i] = i;
  if (s.order == Order::kReverse) std::reverse(sequence.begin(), sequence.end());
  if (s.order == Order::kShuffle) std::shuffle(sequence.begin(), sequence.end(), s.random);
  for (std::uint64_t i : sequence) {
    blockIdx = {static_cast<unsigned>(i % launch.grid.x),
                static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
    run_block();
  }
}

void fail(const std::string& what, Site site) {
  State_& s = g();
  s.error = block_text() + "thread " + text(s.current->index) + " (" + text(site) + "): " + what;
  switch_context(s.current->fiber.context(), s.scheduler);
  std::abort();  // never resumed
}

void join_warp(const char* primitive, std::uint32_t mask, void* argument,
               void (*complete)(void**, std::uint32_t), Site site) {
  Thread& thread = *g().current;
  Warp& warp = warp_of(thread);
  if (!(mask & bit_of(thread))) {
    fail(std::string(primitive) + ": the mask leaves out the calling lane", site);
  }
  auto it = std::find_if(warp.pending.begin(), warp.pending.end(),
                         [&](const Pending& p) { return p.mask == mask; });
  if (it == warp.pending.end()) {
    warp.pending.push_back({primitive, mask, 0, site, complete, {}});
    it = warp.pending.end() - 1;
  } else if (!same(it->primitive, primitive) || !same(it->site, site)) {
    fail(std::string(primitive) + " while other lanes of its mask wait at " + it->primitive + " (" +
             text(it->site) + ")",
         site);
  }
  it->present |= bit_of(thread);
  it->arguments[thread.number % kWarp] = argument;
  const auto index = static_cast<std::size_t>(it - warp.pending.begin());
  if (!try_complete(warp, index, &thread)) sleep(thread, primitive, site);
}

void join_block(const char* primitive, int id, int count, bool wait, Site site) {
  if (id < 0 || id >= kBarriers) fail(std::string(primitive) + ": barrier beyond 15", site);
  if (count % kWarp) fail(std::string(primitive) + ": count is no multiple of 32", site);
  Thread& thread = *g().current;
  Barrier& barrier = g().barriers[id];
  if (barrier.arrived == 0) {
    barrier.primitive = primitive;
    barrier.count = count;
    barrier.site = site;
  } else if (barrier.count != count || (count == 0 && !same(barrier.site, site))) {
    fail(std::string(primitive) + " while other threads wait for it at " + barrier.primitive +
             " (" + text(barrier.site) + ")",
         site);
  }
  ++barrier.arrived;
  if (try_release(barrier)) return;
  if (!wait) return;
  barrier.waiting.push_back(&thread);
  sleep(thread, primitive, site);
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site site) {
  check_aligned(shared, bytes, "cp.async", site);
  check_shared(shared, bytes, "cp.async", site);
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async: source bytes out of range", site);
  if (source_bytes) check_aligned(global, bytes, "cp.async", site);
  std::memset(shared, kPoisonByte, static_cast<std::size_t>(bytes));
  g().current->open.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes});
}

void commit_copies() {
  Thread& thread = *g().current;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_copies(int pending_groups) {
  Thread& thread = *g().current;
  while (static_cast<int>(thread.groups.size()) > pending_groups) {
    for (const Copy& copy : thread.groups.front()) {
      std::memset(copy.shared, 0, static_cast<std::size_t>(copy.bytes));
      if (copy.source_bytes) {
        std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.source_bytes));
      }
    }
    thread.groups.pop_front();
  }
}

void* static_shared(const void* tag, std::size_t bytes) {
  State_& s = g();
  auto [it, fresh] = s.statics.try_emplace(tag);
  if (fresh) {
    it->second = poisoned(bytes);
    std::size_t total = 0;
    for (auto& entry : s.statics) total += entry.second.bytes;
    if (total > kMaxStaticBytes) fail("more than 48 KiB of static shared memory", Site::here());
    if (total + s.dynamic.bytes > most_shared_bytes()) {
      fail("more shared memory than the device has, static and dynamic together", Site::here());
    }
  }
  return it->second.data();
}

void* dynamic_shared() { return g().dynamic.data(); }

void check_aligned(const void* pointer, int bytes, const char* primitive, Site site) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(bytes)) {
    fail(std::string(primitive) + ": address not aligned to " + std::to_string(bytes) + " bytes",
         site);
  }
}

void check_shared(const void* pointer, int bytes, const char* primitive, Site site) {
  auto inside = [&](const Array& array) {
    const char* begin = array.data();
    const char* p = static_cast<const char*>(pointer);
    return p >= begin && p + bytes <= begin + array.bytes;
  };
  if (inside(g().dynamic)) return;
  for (const auto& entry : g().statics) {
    if (inside(entry.second)) return;
  }
  fail(std::string(primitive) + ": address outside shared memory", site);
}

int lane() { return g().current->number % kWarp; }
int thread_number() { return g().current->number; }
void sleep_thread(const char* primitive, Site site) { sleep(*g().current, primitive, site); }
void wake_thread(int number) { wake(*g().threads[static_cast<std::size_t>(number)]); }

std::string block_text() {
  return std::string("kernel ") + g().launch->kernel + ", block " + text(blockIdx) + ": ";
}

}  // namespace emulation

extern "C" const char* emulation_last_kernel() { return emulation::last_kernel(); }
extern "C" void emulation_set_capability(int capability) { emulation::set_capability(capability); }

extern "C" void emulation_set_order(int order, unsigned seed) {
  emulation::set_order(static_cast<emulation::Order>(order), seed);
}
