#include "perplexity/cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <type_traits>

#define LONGROPE_BODY "perplexity/cpu/body.h"
#include "common/cpu/foreach_isa.h"

namespace longrope::perplexity {

void convert_rows(DType from, const MatrixView& matrix, const int64_t* pick, int64_t first,
                  int64_t count, int64_t columns, DType type, void* to) {
  LONGROPE_DISPATCH(run_convert_rows)(from, matrix, pick, first, count, columns, type, to);
}

void panel_of_columns(DType type, const void* from, int64_t rows, int64_t columns, int64_t n,
                      void* to) {
  LONGROPE_DISPATCH(run_panel_of_columns)(type, from, rows, columns, n, to);
}

void panel_of_rows(DType type, const void* from, int64_t rows, int64_t padded, int64_t columns,
                   int64_t first, int64_t n, void* to) {
  LONGROPE_DISPATCH(run_panel_of_rows)(type, from, rows, padded, columns, first, n, to);
}

void transpose(DType type, const void* from, int64_t from_ld, int64_t rows, int64_t columns,
               void* to, int64_t ld) {
  LONGROPE_DISPATCH(run_transpose)(type, from, from_ld, rows, columns, to, ld);
}

void softcap_tile(bool wide, void* tile, int64_t m, int64_t n, double softcap) {
  LONGROPE_DISPATCH(run_softcap_tile)(wide, tile, m, n, softcap);
}

void add_to_statistics(bool wide, const void* tile, int64_t m, int64_t n, void* max, void* sum) {
  LONGROPE_DISPATCH(run_add_to_statistics)(wide, tile, m, n, max, sum);
}

void gradient_tile(bool wide, void* tile, int64_t m, int64_t n, const void* max,
                   const void* log_sum, const void* grad, const int32_t* target, double softcap) {
  LONGROPE_DISPATCH(run_gradient_tile)(wide, tile, m, n, max, log_sum, grad, target, softcap);
}

void store_gradient(DType type, const void* tile, int64_t m, int64_t n, void* rows, int64_t ld,
                    void* panel) {
  LONGROPE_DISPATCH(run_store_gradient)(type, tile, m, n, rows, ld, panel);
}

void float64_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add,
                     const void* a, const void* b, void* c) {
  LONGROPE_DISPATCH(run_float64_product)(m, n, k, lda, ldc, add, a, b, c);
}

}  // namespace longrope::perplexity
