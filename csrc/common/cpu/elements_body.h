// Loads and stores of every element type, for one instruction set (no include guard: part of a
// body).

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of the arithmetic.
template <typename T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a zero of the element type.
template <typename F>
inline void for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat64:
      return f(double{});
  }
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void store(float* y, float value) { *y = value; }
inline void store(double* y, double value) { *y = value; }
inline void store(BFloat16* y, float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40;
  y->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
}

// float16: a plain loop over these does not become conversion instructions, so where speed matters
// it goes through a row of floats (load_row, store_row).
inline float half_to_float(uint16_t half) {
  // Shift exponent and mantissa in place and let one multiplication rebias, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  __builtin_memcpy(&value, &magnitude, sizeof(value));
  value *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinities and NaN
  bits |= static_cast<uint32_t>(half & 0x8000) << 16;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint16_t half_from_float(float value) {  // to nearest even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  // Normal: rebias and round the 13 bits that go. Subnormal: the addition of 0.5 aligns the value
  // so that its last bit weighs 2^-24, and rounds.
  const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  float small;
  __builtin_memcpy(&small, &bits, sizeof(small));
  small += 0.5f;
  uint32_t subnormal;
  __builtin_memcpy(&subnormal, &small, sizeof(subnormal));
  subnormal -= 0x3f000000;
  uint32_t half = bits < 0x38800000 ? subnormal : normal;  // 2^-14
  half = bits >= 0x477ff000 ? 0x7c00 : half;               // 65520 and more
  half = bits > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(half | sign);
}

inline float load(Float16 x) { return half_to_float(x.bits); }

// A row to the type of the arithmetic, and back.
template <typename T>
inline void load_row(const T* x, RealOf<T>* y, int64_t count) {
  if constexpr (std::is_same_v<T, RealOf<T>>) {
    __builtin_memcpy(y, x, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = load(x[i]);
  }
}

template <typename T>
inline void store_row(const RealOf<T>* x, T* y, int64_t count) {
  if constexpr (std::is_same_v<T, RealOf<T>>) {
    __builtin_memcpy(y, x, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) store(y + i, x[i]);
  }
}

inline void load_row(const Float16* x, float* y, int64_t count) {
  int64_t i = 0;
#if LONGROPE_ISA_BYTES == 64
  for (; i + 16 <= count; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    _mm512_storeu_ps(y + i, _mm512_cvtph_ps(half));
  }
#elif LONGROPE_ISA_BYTES == 32
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i) y[i] = half_to_float(x[i].bits);
}

inline void store_row(const float* x, Float16* y, int64_t count) {
  int64_t i = 0;
#if LONGROPE_ISA_BYTES == 64
  for (; i + 16 <= count; i += 16) {
    const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), half);
  }
#elif LONGROPE_ISA_BYTES == 32
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
#endif
  for (; i < count; ++i) y[i].bits = half_from_float(x[i]);
}
