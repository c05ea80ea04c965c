// A body for test_isa.cpp (see common/cpu/foreach_isa.h).
inline int vector_bytes() { return LONGROPE_ISA_BYTES; }

inline void twice(float* x, int count) {
  for (int i = 0; i < count; ++i) x[i] *= 2;
}
