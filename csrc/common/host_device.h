// Functions that nvcc compiles for both sides and every other compiler for its own.
#pragma once

#if defined(__CUDACC__)
#define LONGROPE_HOST_DEVICE __host__ __device__
#else
#define LONGROPE_HOST_DEVICE
#endif
