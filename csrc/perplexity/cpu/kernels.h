// The inner loops of linear cross-entropy, each run by the instruction set in use. Types come as
// values: `type` is an element type, `wide` says that accumulators are float64 instead of float32.
#pragma once

#include <cstdint>

#include "perplexity/perplexity.h"

namespace longrope::perplexity {

inline int64_t bytes_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// How many rows of B are interleaved: see Product in perplexity.h.
inline int64_t pair_of(DType type) { return type == DType::kBFloat16 ? 2 : 1; }

// Rows first .. first + count of the matrix (through the index `pick`, if given), converted to
// `type`, as [count][columns].
void convert_rows(DType from, const MatrixView& matrix, const int64_t* pick, int64_t first,
                  int64_t count, int64_t columns, DType type, void* to);

// A panel is a B of n columns, [ceil(k / pair)][n][pair]. From [rows][columns] of `type`:
// k runs over the columns, the n columns of B are the rows (zero beyond `rows`) ...
void panel_of_columns(DType type, const void* from, int64_t rows, int64_t columns, int64_t n,
                      void* to);
// ... or k runs over `padded` rows and n over the columns from `first` (zero beyond both).
void panel_of_rows(DType type, const void* from, int64_t rows, int64_t padded, int64_t columns,
                   int64_t first, int64_t n, void* to);

// [rows][columns] with row stride from_ld -> [columns][ld], zero in [rows, ld).
void transpose(DType type, const void* from, int64_t from_ld, int64_t rows, int64_t columns,
               void* to, int64_t ld);

// On a tile of logits [m][n]; max, sum, log_sum, grad, target: [n]. See tile_body.h.
void softcap_tile(bool wide, void* tile, int64_t m, int64_t n, double softcap);
void add_to_statistics(bool wide, const void* tile, int64_t m, int64_t n, void* max, void* sum);
void gradient_tile(bool wide, void* tile, int64_t m, int64_t n, const void* max,
                   const void* log_sum, const void* grad, const int32_t* target, double softcap);

// The gradient tile [m][n] of accumulators, rounded to `type`: as rows with stride ld and as a
// panel whose k runs over the tile's rows. Either may be null; m is a multiple of the pair.
void store_gradient(DType type, const void* tile, int64_t m, int64_t n, void* rows, int64_t ld,
                    void* panel);

// C[m, n] = A[m, k] B[k, n], added to C where `add`; B is a panel.
void float64_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add,
                     const void* a, const void* b, void* c);

}  // namespace longrope::perplexity
