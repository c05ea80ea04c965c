// Tiles as tensor maps bring them to shared memory, and the two products of a warpgroup over them.
#pragma once

#include "attention/cuda/views.cuh"
#include "common/cuda/tensor_map.cuh"

namespace longrope::cuda::sm90 {

constexpr int kPanelBytes = 128;  // of a row: 64 columns

// A tile lies in panels of 64 columns, as copy_box writes them.
template <int kHeadDim, int kRows>
struct alignas(1024) Panels {
  static constexpr int kBytes = 2 * kHeadDim * kRows;
  static constexpr int kStride = kPanelBytes * kRows;  // from panel to panel

  unsigned char bytes[kBytes];

  // Begins to copy the rows from `row` on.
  __device__ __forceinline__ void copy(const TensorMap& map, uint64_t* barrier, int row, int head,
                                       int batch) {
#pragma unroll
    for (int panel = 0; panel < kHeadDim / 64; ++panel) {
      copy_box(bytes + panel * kStride, map, barrier, {64 * panel, row, head, batch});
    }
  }

  // Makes rows [begin, end) zeros: the part of one of `threads` threads.
  __device__ __forceinline__ void clear(int begin, int end, int thread, int threads) {
    const int units = (end - begin) * (kPanelBytes / 16);  // of a panel
#pragma unroll 1
    for (int panel = 0; panel < kHeadDim / 64; ++panel) {
      unsigned char* const rows = bytes + panel * kStride + begin * kPanelBytes;
#pragma unroll 1
      for (int i = thread; i < units; i += threads) store(rows + 16 * i, Pack<unsigned char, 16>{});
    }
  }
};

// The shared memory of the block, as a structure of tiles and barriers, and how much of it to ask
// for: tiles are aligned to more than a launch gives.
constexpr size_t kTileAlignment = 1024;
template <typename Shared>
constexpr size_t kBytesOf = sizeof(Shared) + kTileAlignment;
template <typename Shared>
__device__ __forceinline__ Shared& shared_as() {
  unsigned char* const begin = dynamic_shared();
  const auto address = reinterpret_cast<uintptr_t>(begin);
  // An offset from it, so that the compiler still knows that this is shared memory.
  return *reinterpret_cast<Shared*>(begin + (round_up(address, kTileAlignment) - address));
}

// Names, for matrix_at, of a tile with its rows along the sum, and of the same one with its rows
// across the sum. All names of a kernel are made from one by adding constants.
template <typename Tile>
__device__ __forceinline__ uint64_t along(const Tile& tile) {
  return matrix_at(tile.bytes, 16, 8 * kPanelBytes);
}
template <typename Tile>
__device__ constexpr uint64_t across(uint64_t along) {
  return along + (static_cast<uint64_t>(Tile::kStride / 16 - 1) << 16);
}

// Begins c = a b^T for 64 rows of a tile A and all rows of a tile B.
template <typename T, typename A, typename B, int kHeadDim, int kColumns>
__device__ __forceinline__ void begin_transposed(float (&c)[kColumns][4], uint64_t a, uint64_t b) {
  fence_products();
#pragma unroll
  for (int depth = 0; depth < kHeadDim; depth += 16) {
    const int panel = depth / 64, offset = depth % 64 * 2;
    begin_product<T>(c, moved(a, panel * A::kStride + offset),
                     moved(b, panel * B::kStride + offset), depth > 0);
  }
  commit_products();
}

// Begins c += left b, the rows of `b` across the sum.
template <typename T, int kColumns, int kSixteens>
__device__ __forceinline__ void begin_sum(float (&c)[kColumns][4],
                                          const uint32_t (&left)[kSixteens][4], uint64_t b) {
  fence_products();
#pragma unroll
  for (int i = 0; i < kSixteens; ++i) begin_product<T>(c, left[i], moved(b, 16 * i * kPanelBytes));
  commit_products();
}

// Of a tensor whose tiles have `rows` rows. Host code.
inline TensorMap map_of(const AttentionTensor& x, const AttentionParams& p, int64_t heads,
                        int64_t tokens, int rows) {
  // The stride of a dimension of one element may be anything, and the map wants a multiple of 16.
  const int64_t whole = std::max<int64_t>(8, x.token_stride * tokens);
  auto bytes = [&](int64_t stride, int64_t size) { return 2 * (size > 1 ? stride : whole); };
  return tensor_map({x.data,
                     {read_columns(p), tokens, heads, p.batch},
                     {bytes(x.token_stride, tokens), bytes(x.head_stride, heads),
                      bytes(x.batch_stride, p.batch)}},
                    rows);
}

}  // namespace longrope::cuda::sm90
