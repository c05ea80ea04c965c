// The signature of a matrix product that torch-free code is handed by its caller.
#pragma once

#include <cstdint>

namespace longrope {

// C[m, n] = A[m, k] B[k, n], added to C where `add`, summed in float32; row strides in elements. Of
// floats, B is row-major. Of bfloat16, k is a multiple of 32 and B lies in pairs of rows,
// [k / 2][ldb][2], as the dot-product instructions want it.
using Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                         bool add, const void* a, const void* b, float* c);

}  // namespace longrope
