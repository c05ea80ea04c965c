#include "bindings/bfloat16_product.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <array>
#include <exception>

namespace longrope {
namespace {

void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const void* a, const void* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

// Whether oneDNN multiplies bfloat16 natively and reads B in pairs of rows as we write it. Torch
// does not tell (could_pack is true for AMX alone), so a small product is tried once.
bool works() {
#if defined(__x86_64__)
  static const bool answer = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    constexpr int64_t kSize = 32;
    std::array<at::BFloat16, kSize * kSize> a, b;
    std::array<float, kSize * kSize> c;
    const auto value = [](int64_t i, int64_t j) { return static_cast<float>((3 * i + j) % 7 - 3); };
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t j = 0; j < kSize; ++j) {
        a[i * kSize + j] = value(i, j);
        b[(i / 2 * kSize + j) * 2 + i % 2] = value(j, i) + 1.0f;
      }
    }
    try {
      product(kSize, kSize, kSize, kSize, kSize, kSize, false, a.data(), b.data(), c.data());
      release_bfloat16_product();
    } catch (const std::exception&) {
      return false;
    }
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t j = 0; j < kSize; ++j) {
        float sum = 0.0f;  // small integers: exact
        for (int64_t k = 0; k < kSize; ++k) sum += value(i, k) * (value(j, k) + 1.0f);
        if (c[i * kSize + j] != sum) return false;
      }
    }
    return true;
  }();
  return answer;
#else
  return false;
#endif
}

}  // namespace

Product bfloat16_product() { return works() ? product : nullptr; }

void release_bfloat16_product() { at::native::cpublas::brgemm_release(true); }

}  // namespace longrope
