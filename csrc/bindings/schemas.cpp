// The schema of every op, in one place. Implementations register by dispatch key in the op's own
// file beside this one; fake (meta) kernels and autograd formulas are in longrope/ops/<op>.py.
#include <torch/library.h>

TORCH_LIBRARY(longrope, m) {}
