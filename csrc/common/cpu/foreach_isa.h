// Compiles one body for every instruction set (no include guard: included once per op).
//
//   #include "common/cpu/vocabulary.h"           // everything the body needs, first
//   #define LONGROPE_BODY "rope/cpu/body.h"      // the body: includes nothing but other bodies
//   #include "common/cpu/foreach_isa.h"
//
// The body is included three times, in the namespaces longrope::scalar, longrope::avx2 and
// longrope::avx512, each under its target pragma, with LONGROPE_ISA_BYTES set to the width of a
// vector register (16, 32, 64). System headers stay outside: an inline library function compiled
// for AVX-512 could otherwise be picked by the linker for every caller. What a body instantiates of
// the templates in them is compiled without the pragma, as their text stands before it.
// LONGROPE_DISPATCH(f) names the instance of f that fits the set in use.
#include "common/cpu/isa.h"

#define LONGROPE_ISA_BYTES 16
namespace longrope::scalar {
#include LONGROPE_BODY
}
#undef LONGROPE_ISA_BYTES

#if defined(__x86_64__)

#define LONGROPE_ISA_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace longrope::avx2 {
#include LONGROPE_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LONGROPE_ISA_BYTES

#define LONGROPE_ISA_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace longrope::avx512 {
#include LONGROPE_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LONGROPE_ISA_BYTES

#define LONGROPE_DISPATCH(function)                                             \
  (::longrope::isa() == ::longrope::Isa::kAvx512 ? ::longrope::avx512::function \
   : ::longrope::isa() == ::longrope::Isa::kAvx2 ? ::longrope::avx2::function   \
                                                 : ::longrope::scalar::function)

#else
#define LONGROPE_DISPATCH(function) ::longrope::scalar::function
#endif

#undef LONGROPE_BODY
