// What vocabulary_body.h needs, once and outside the bodies (foreach_isa.h says why).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/cpu/memory.h"
#include "common/dtype.h"
#include "common/numbers.h"

// Rearranges the elements of two vectors of four, by the name that each compiler has for it.
#if defined(__clang__)
#define LONGROPE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
namespace longrope {
typedef int32_t ShuffleIndices __attribute__((vector_size(16)));
}
#define LONGROPE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ::longrope::ShuffleIndices{__VA_ARGS__})
#endif
