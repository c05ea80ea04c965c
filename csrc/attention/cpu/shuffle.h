// Rearranging the elements of two vectors of four, by the name that each compiler has for it.
#pragma once

#include <cstdint>

#if defined(__clang__)
#define LONGROPE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
namespace longrope {
typedef int32_t ShuffleIndices __attribute__((vector_size(16)));
}
#define LONGROPE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ::longrope::ShuffleIndices{__VA_ARGS__})
#endif
