// What the forward and the backward pass share, in order (no include guard: part of a body).
// clang-format off
#include "attention/cpu/product_body.h"
#include "attention/cpu/pack_body.h"
#include "attention/cpu/task_body.h"
#include "attention/cpu/library_pack_body.h"
// clang-format on
