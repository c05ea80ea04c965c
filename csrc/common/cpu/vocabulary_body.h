// What the bodies of all ops are written in, for one instruction set; vocabulary.h comes before
// foreach_isa.h.
// clang-format off
#include "common/cpu/elements_body.h"
#include "common/cpu/vector_body.h"
#include "common/cpu/math_body.h"
#include "common/cpu/transpose_body.h"
// clang-format on
