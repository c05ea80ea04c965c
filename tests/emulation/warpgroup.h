// What compute capability 9.0 adds to the runtime: memory barriers, copies of tensor tiles and
// products of a warpgroup, each performed as late as its wait allows.
//
// csrc/common/cuda/sm90.cuh says what each does. Caught besides what runtime.h catches: a copy or a
// product that is used before its wait or never waited for (what it writes is poison until then), a
// left operand or a tile that changes under a product (both are read at the wait), a product
// without its fence, a barrier that was never made or is arrived at too often. Not caught: stores
// that publish_stores should have published, as memory here has one view.
#pragma once

#include <cstdint>

#include "emulation/runtime.h"

namespace emulation {

void init_barrier(const void* barrier, int arrivals, Site site);
void arrive(const void* barrier, long bytes, Site site);
void wait_barrier(const void* barrier, int parity, Site site);

// A tensor of 16-bit elements, innermost dimension first; strides in bytes. Boxes are of 64
// elements in `rows` rows.
struct TensorMap {
  const char* data;
  std::int64_t sizes[4], strides[4];
  int rows;
};

// Throws std::runtime_error for what the driver refuses.
TensorMap tensor_map(const void* data, const std::int64_t (&sizes)[4],
                     const std::int64_t (&strides)[3], int rows);

void copy_box(void* shared, const TensorMap& map, const void* barrier, const int (&at)[4],
              Site site);

// One thread's part in a product of its warpgroup.
struct Product {
  float* sums;  // columns / 2 of them
  int columns;
  bool is_bf16;
  const std::uint32_t* left;  // four registers; nullptr: the matrix `a`
  std::uint64_t a, b;         // with `left`, rows of b lie across the sums
  bool add;
};

void fence_products();
void begin_product(const Product& product, Site site);
void commit_products();
void wait_products(int pending_groups, Site site);

// Where an address stands in the dynamic shared memory of the block.
std::uint32_t shared_offset(const void* shared);

// At the beginning and the end of every block; the end fails where something is under way.
void begin_block();
void end_block();

}  // namespace emulation
