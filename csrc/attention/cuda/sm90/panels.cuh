// Tiles as tensor maps bring them to shared memory.
#pragma once

#include "attention/cuda/views.cuh"
#include "common/cuda/tensor_map.cuh"

namespace longrope::cuda {

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

  // Makes the rows from `row` on zeros: the part of one of `threads` threads.
  __device__ __forceinline__ void clear(int row, int thread, int threads) {
    const int units = (kRows - row) * (kPanelBytes / 16);  // of a panel
#pragma unroll 1
    for (int panel = 0; panel < kHeadDim / 64; ++panel) {
      unsigned char* const rows = bytes + panel * kStride + row * kPanelBytes;
#pragma unroll 1
      for (int i = thread; i < units; i += threads) store(rows + 16 * i, Pack<unsigned char, 16>{});
    }
  }
};

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

}  // namespace longrope::cuda
