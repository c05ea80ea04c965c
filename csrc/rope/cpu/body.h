// All that is compiled once per instruction set.
// clang-format off
#include "common/cpu/vocabulary_body.h"
#include "rope/cpu/table_body.h"
#include "rope/cpu/rotate_body.h"
#include "rope/cpu/rope_body.h"
#include "rope/cpu/rope_backward_body.h"
// clang-format on
