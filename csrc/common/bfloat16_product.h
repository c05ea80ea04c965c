// The signature of a bfloat16 matrix product that torch-free code is handed by its caller.
#pragma once

#include <cstdint>

namespace longrope {

// C[m, n] (+)= A[m, k] B[k, n], summed in float32: A in rows of stride lda, B in pairs of rows,
// [k / 2][ldb][2], C in rows of stride ldc; k a multiple of 32.
using BFloat16Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                 int64_t ldc, bool add, const void* a, const void* b, float* c);

}  // namespace longrope
