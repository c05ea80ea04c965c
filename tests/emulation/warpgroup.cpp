#include "emulation/warpgroup.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <vector>

#include "common/cuda/twin.cuh"

namespace emulation {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kRows = 64, kDepth = 16;  // of a product
constexpr int kUnit = 16;               // bytes that keep together under the swizzle

struct BoxCopy {
  char* shared;
  TensorMap map;
  int at[4];
};

struct MemoryBarrier {
  int expected = 0, arrived = 0, parity = 0;
  long bytes = 0;  // announced and not yet there
  std::vector<BoxCopy> copies;
  std::vector<int> waiting;
  int arriver = -1;  // sleeps until one that waited has gone on
};

// The sums of a thread that products under way will write.
struct Sums {
  float* registers;
  std::vector<float> values;
};

struct ProductsOfThread {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // oldest first
  std::vector<Sums> sums;
  bool fenced = false;

  Sums* of(const float* registers) {
    for (Sums& s : sums) {
      if (s.registers == registers) return &s;
    }
    return nullptr;
  }
};

struct Rendezvous {
  int arrived = 0;
  std::vector<int> waiting;
};

std::map<const void*, MemoryBarrier> barriers;
std::vector<ProductsOfThread> products;  // by thread
std::map<int, Rendezvous> rendezvous;    // by warpgroup

MemoryBarrier& find(const void* barrier, const char* primitive, Site site) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail(std::string(primitive) + ": no barrier was made there", site);
  return found->second;
}

void wake_all(std::vector<int>& waiting) {
  for (const int thread : waiting) wake_thread(thread);
  waiting.clear();
}

void end_phase_if_complete(MemoryBarrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes != 0) return;
  barrier.arrived = 0;
  barrier.parity ^= 1;
  wake_all(barrier.waiting);
}

char* swizzled(char* address) {  // bits 4 to 6 of the address, by bits 7 to 9
  const auto a = reinterpret_cast<std::uintptr_t>(address);
  return reinterpret_cast<char*>(a ^ (a >> 7 & 7) << 4);
}

long bytes_of(const TensorMap& map) { return 128L * map.rows; }

void perform(const BoxCopy& copy) {
  const TensorMap& map = copy.map;
  for (int row = 0; row < map.rows; ++row) {
    const std::int64_t at[4] = {copy.at[0], std::int64_t{copy.at[1]} + row, copy.at[2], copy.at[3]};
    bool inside = true;
    std::int64_t offset = at[0] * 2;
    for (int d = 1; d < 4; ++d) {
      inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
      offset += at[d] * map.strides[d];
    }
    for (int unit = 0; unit < 8; ++unit) {
      char* const to = swizzled(copy.shared + 128 * row + kUnit * unit);
      std::memset(to, 0, kUnit);
      const std::int64_t columns = inside ? map.sizes[0] - at[0] - 8 * unit : 0;
      if (columns > 0) {
        std::memcpy(to, map.data + offset + kUnit * unit,
                    static_cast<std::size_t>(2 * std::min<std::int64_t>(columns, 8)));
      }
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

float widen(std::uint16_t bits, bool is_bf16) {
  return is_bf16 ? longrope::cuda::twin::to_float(longrope::cuda::bf16{bits})
                 : longrope::cuda::twin::to_float(longrope::cuda::f16{bits});
}

// The eight elements from `address` on, before the swizzle.
void read_unit(char* address, bool is_bf16, float* out, int stride, Site site) {
  char* const at = swizzled(address);
  check_shared(at, kUnit, "wgmma", site);
  std::uint16_t bits[8];
  std::memcpy(bits, at, kUnit);
  for (int e = 0; e < 8; ++e) out[e * stride] = widen(bits[e], is_bf16);
}

struct Matrix {
  char* start;
  int panel, eight_rows;  // bytes

  Matrix(std::uint64_t name, Site site)
      : start(static_cast<char*>(dynamic_shared()) + ((name & 0x3FFF) << 4)),
        panel(static_cast<int>(name >> 16 & 0x3FFF) << 4),
        eight_rows(static_cast<int>(name >> 32 & 0x3FFF) << 4) {
    if (name >> 62 != 1) fail("wgmma: expected a matrix with the swizzle of 128 bytes", site);
  }
};

// out[k][row] of a matrix whose rows lie along the sum.
void read_along(const Matrix& m, int rows, bool is_bf16, float* out, Site site) {
  for (int row = 0; row < rows; ++row) {
    for (int unit = 0; unit < kDepth / 8; ++unit) {
      read_unit(m.start + row / 8 * m.eight_rows + row % 8 * 128 + kUnit * unit, is_bf16,
                out + 8 * unit * rows + row, rows, site);
    }
  }
}

// out[k][column] of one whose rows lie across the sum.
void read_across(const Matrix& m, int columns, bool is_bf16, float* out, Site site) {
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < columns; column += 8) {
      read_unit(
          m.start + column / 64 * m.panel + k / 8 * m.eight_rows + k % 8 * 128 + column % 64 * 2,
          is_bf16, out + k * columns + column, 1, site);
    }
  }
}

// The place of a thread's i-th sum.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// sums[row][column] += sum over k of a[k][row] b[k][column], k from 0 up.
void multiply(float* sums, const float* a, const float* b, int columns) {
  for (int row = 0; row < kRows; ++row) {
    float* const to = sums + row * columns;
    for (int k = 0; k < kDepth; ++k) {
      const float x = a[k * kRows + row];
      const float* const y = b + k * columns;
      for (int column = 0; column < columns; ++column) to[column] += x * y[column];
    }
  }
}

void perform(int first, std::size_t op, Site site) {
  auto part = [&](int t) -> const Product& { return products[first + t].groups.front()[op]; };
  const Product one = part(0);
  std::vector<float> a(kDepth * kRows), b(kDepth * one.columns), sums(kRows * one.columns);
  if (one.left) {
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int r = 0; r < 4; ++r) {
        const std::uint32_t pair = part(t).left[r];
        for (int e = 0; e < 2; ++e) {
          const int column = t % 4 * 2 + r / 2 * 8 + e;
          a[column * kRows + t / 32 * 16 + t % 32 / 4 + r % 2 * 8] =
              widen(static_cast<std::uint16_t>(pair >> 16 * e), one.is_bf16);
        }
      }
    }
    read_across(Matrix(one.b, site), one.columns, one.is_bf16, b.data(), site);
  } else {
    read_along(Matrix(one.a, site), kRows, one.is_bf16, a.data(), site);
    read_along(Matrix(one.b, site), one.columns, one.is_bf16, b.data(), site);
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    const Product& p = part(t);
    if (p.columns != one.columns || p.a != one.a || p.b != one.b || p.add != one.add) {
      fail("wgmma: the threads of a warpgroup ask for different products", site);
    }
    if (!p.add) continue;
    const std::vector<float>& values = products[first + t].of(p.sums)->values;
    for (int i = 0; i < p.columns / 2; ++i) {
      sums[row_of(t, i) * one.columns + column_of(t, i)] = values[i];
    }
  }
  multiply(sums.data(), a.data(), b.data(), one.columns);
  for (int t = 0; t < kWarpgroup; ++t) {
    std::vector<float>& values = products[first + t].of(part(t).sums)->values;
    for (int i = 0; i < one.columns / 2; ++i) {
      values[i] = sums[row_of(t, i) * one.columns + column_of(t, i)];
    }
  }
}

// Takes the oldest group from a thread, with what only that wrote.
void finish_group(ProductsOfThread& thread) {
  const std::vector<Product> done = std::move(thread.groups.front());
  thread.groups.pop_front();
  for (const Product& p : done) {
    Sums* const sums = thread.of(p.sums);
    bool written = sums == nullptr;  // given back already
    for (const auto& group : thread.groups) {
      for (const Product& other : group) written |= other.sums == p.sums;
    }
    if (written) continue;
    std::copy(sums->values.begin(), sums->values.end(), sums->registers);
    thread.sums.erase(thread.sums.begin() + (sums - thread.sums.data()));
  }
}

ProductsOfThread& mine() { return products[static_cast<std::size_t>(thread_number())]; }

}  // namespace

void init_barrier(const void* barrier, int arrivals, Site site) {
  check_aligned(barrier, 8, "mbarrier.init", site);
  check_shared(barrier, 8, "mbarrier.init", site);
  barriers[barrier] = MemoryBarrier();
  barriers[barrier].expected = arrivals;
}

void arrive(const void* barrier, long bytes, Site site) {
  MemoryBarrier& b = find(barrier, "mbarrier.arrive", site);
  if (b.arrived == b.expected) fail("mbarrier.arrive: one arrival too many", site);
  b.bytes += bytes;
  ++b.arrived;
  // Who waited goes first: what it does on the news meets this thread as early as it can.
  const bool hands_over = !b.waiting.empty();
  end_phase_if_complete(b);
  if (hands_over && b.waiting.empty()) {
    b.arriver = thread_number();
    sleep_thread("mbarrier.arrive", site);
  }
}

void wait_barrier(const void* barrier, int parity, Site site) {
  MemoryBarrier& b = find(barrier, "mbarrier.try_wait", site);
  while (b.parity == parity) {
    const std::vector<BoxCopy> copies = std::move(b.copies);
    b.copies.clear();
    for (const BoxCopy& copy : copies) {
      perform(copy);
      b.bytes -= bytes_of(copy.map);
    }
    if (!copies.empty()) end_phase_if_complete(b);
    if (b.parity != parity) break;
    b.waiting.push_back(thread_number());
    sleep_thread("mbarrier.try_wait", site);
    if (b.arriver >= 0) wake_thread(b.arriver);
    b.arriver = -1;
  }
}

TensorMap tensor_map(const void* data, const std::int64_t (&sizes)[4],
                     const std::int64_t (&strides)[3], int rows) {
  TensorMap map{static_cast<const char*>(data), {}, {2}, rows};
  bool fine = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && rows > 0 && rows <= 256;
  for (int d = 0; d < 4; ++d) {
    map.sizes[d] = sizes[d];
    fine = fine && sizes[d] > 0 && sizes[d] <= std::int64_t{1} << 32;
    if (d == 0) continue;
    map.strides[d] = strides[d - 1];
    fine = fine && map.strides[d] > 0 && map.strides[d] % 16 == 0 &&
           map.strides[d] < std::int64_t{1} << 40;
  }
  if (!fine) throw std::runtime_error("cuTensorMapEncodeTiled: refused");
  return map;
}

void copy_box(void* shared, const TensorMap& map, const void* barrier, const int (&at)[4],
              Site site) {
  check_aligned(shared, 1024, "cp.async.bulk.tensor", site);
  const long bytes = bytes_of(map);
  check_shared(shared, static_cast<int>(bytes), "cp.async.bulk.tensor", site);
  std::memset(shared, kPoisonByte, static_cast<std::size_t>(bytes));
  MemoryBarrier& b = find(barrier, "cp.async.bulk.tensor", site);
  b.copies.push_back({static_cast<char*>(shared), map, {at[0], at[1], at[2], at[3]}});
  wake_all(b.waiting);  // one of them performs it
}

void fence_products() { mine().fenced = true; }

void begin_product(const Product& product, Site site) {
  ProductsOfThread& thread = mine();
  if (!thread.fenced) fail("wgmma.mma_async: expected a wgmma.fence before it", site);
  if (!thread.of(product.sums)) {
    const int count = product.columns / 2;
    thread.sums.push_back({product.sums, {product.sums, product.sums + count}});
    std::fill(product.sums, product.sums + count, std::nanf(""));
  }
  thread.open.push_back(product);
}

void commit_products() {
  ProductsOfThread& thread = mine();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

// On the device a warp may pass while another is still on its way; here all four meet, and what is
// due is performed when the last one comes.
void wait_products(int pending_groups, Site site) {
  ProductsOfThread& thread = mine();
  thread.fenced = false;  // registers may be written from now on
  if (static_cast<int>(thread.groups.size()) <= pending_groups) return;
  const int me = thread_number(), warpgroup = me / kWarpgroup, first = warpgroup * kWarpgroup;
  Rendezvous& meeting = rendezvous[warpgroup];
  if (++meeting.arrived < kWarpgroup) {
    meeting.waiting.push_back(me);
    sleep_thread("wgmma.wait_group", site);
    return;
  }
  meeting.arrived = 0;
  while (static_cast<int>(thread.groups.size()) > pending_groups) {
    const std::size_t count = thread.groups.front().size();
    for (int t = 0; t < kWarpgroup; ++t) {
      const auto& groups = products[first + t].groups;
      if (groups.empty() || groups.front().size() != count) {
        fail("wgmma.wait_group: the threads of a warpgroup wait for different products", site);
      }
    }
    for (std::size_t op = 0; op < count; ++op) perform(first, op, site);
    for (int t = 0; t < kWarpgroup; ++t) finish_group(products[first + t]);
  }
  wake_all(meeting.waiting);
}

std::uint32_t shared_offset(const void* shared) {
  return static_cast<std::uint32_t>(static_cast<const char*>(shared) -
                                    static_cast<const char*>(dynamic_shared()));
}

void begin_block() {
  barriers.clear();
  rendezvous.clear();
  products.assign(static_cast<std::size_t>(blockDim.x * blockDim.y * blockDim.z), {});
}

void end_block() {
  for (const auto& [address, barrier] : barriers) {
    if (!barrier.copies.empty()) {
      throw std::runtime_error(block_text() + "a copy of a tensor tile was never waited for");
    }
  }
  for (const ProductsOfThread& thread : products) {
    if (!thread.open.empty() || !thread.groups.empty()) {
      throw std::runtime_error(block_text() + "a product of a warpgroup was never waited for");
    }
  }
}

}  // namespace emulation
