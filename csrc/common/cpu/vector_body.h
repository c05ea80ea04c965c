// Vectors by the compiler's extensions: one body for every instruction set (no include guard: part
// of a body). Comparisons are written so that NaN survives them.

// kWidth elements side by side.
template <int kWidth>
struct Lanes {
  typedef float Floats __attribute__((vector_size(kWidth * 4)));
  typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
  typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
};

// As many as a register holds.
template <typename Real>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kLanes = LONGROPE_ISA_BYTES / sizeof(float);
  typedef Lanes<kLanes>::Floats Type;
};

template <>
struct Vector<double> {
  static constexpr int kLanes = LONGROPE_ISA_BYTES / sizeof(double);
  typedef double Type __attribute__((vector_size(LONGROPE_ISA_BYTES)));
};

template <typename Real>
using VectorOf = typename Vector<Real>::Type;
using Floats = VectorOf<float>;
using Words = Lanes<Vector<float>::kLanes>::Words;
using Halves = Lanes<Vector<float>::kLanes>::Halves;

// From and to any address.
template <typename V>
inline V load_as(const void* x) {
  V value;
  __builtin_memcpy(&value, x, sizeof(value));
  return value;
}

template <typename V>
inline void store_as(void* y, V value) {
  __builtin_memcpy(y, &value, sizeof(value));
}

template <typename Real>
inline VectorOf<Real> load_vector(const Real* x) {
  return load_as<VectorOf<Real>>(x);
}

template <typename Real>
inline void store_vector(Real* y, VectorOf<Real> value) {
  store_as(y, value);
}

template <typename V>
inline auto bits_as_floats(V words) {
  return (typename Lanes<sizeof(V) / 4>::Floats) words;
}

template <typename V>
inline auto bits_as_words(V floats) {
  return (typename Lanes<sizeof(V) / 4>::Words) floats;
}

// To bfloat16, to nearest, ties away from zero. NaN may become zero here.
inline void store_vector(BFloat16* y, Floats value) {
  store_as(y, __builtin_convertvector((bits_as_words(value) + 0x8000) >> 16, Halves));
}

// Two rows to bfloat16, element by element in pairs, rounded in the same way.
inline void store_pairs(BFloat16* y, Floats first, Floats second) {
  const Words low = (bits_as_words(first) + 0x8000) >> 16;
  const Words high = (bits_as_words(second) + 0x8000) & 0xffff0000u;
  store_as(y, low | high);
}

// The lower 16 bits of one and the upper ones of the other, in every word.
template <typename V>
inline V with_upper_halves(V low, V high) {
#if LONGROPE_ISA_BYTES == 32
  if constexpr (sizeof(V) == 32) return (V)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#endif
  return (low & 0xffffu) | (high & 0xffff0000u);
}

template <typename Real>
inline VectorOf<Real> broadcast(Real x) {
  return x - VectorOf<Real>{};
}

// The greater of two in every lane; NaN of b survives.
template <typename Real>
inline VectorOf<Real> greater(VectorOf<Real> a, VectorOf<Real> b) {
  return a > b ? a : b;
}

template <typename Real>
inline Real horizontal_max(VectorOf<Real> x) {
  Real most = x[0];
  for (int i = 1; i < Vector<Real>::kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

template <typename Real>
inline Real horizontal_sum(VectorOf<Real> x) {
  Real sum = x[0];
  for (int i = 1; i < Vector<Real>::kLanes; ++i) sum += x[i];
  return sum;
}

#if LONGROPE_ISA_BYTES == 64
// What the compiler does not find behind the loops above: one instruction, and trees.
template <>
inline Floats greater<float>(Floats a, Floats b) {
  return _mm512_max_ps(a, b);
}
template <>
inline float horizontal_max<float>(Floats x) {
  return _mm512_reduce_max_ps(x);
}
template <>
inline float horizontal_sum<float>(Floats x) {
  return _mm512_reduce_add_ps(x);
}
#endif

// The sums of four vectors beside each other.
inline Lanes<4>::Floats horizontal_sums(Floats a, Floats b, Floats c, Floats d) {
#if LONGROPE_ISA_BYTES == 64
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 quarters =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#elif LONGROPE_ISA_BYTES == 32
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#else
  const Floats ab = LONGROPE_SHUFFLE(a, b, 0, 4, 1, 5) + LONGROPE_SHUFFLE(a, b, 2, 6, 3, 7);
  const Floats cd = LONGROPE_SHUFFLE(c, d, 0, 4, 1, 5) + LONGROPE_SHUFFLE(c, d, 2, 6, 3, 7);
  return LONGROPE_SHUFFLE(ab, cd, 0, 1, 4, 5) + LONGROPE_SHUFFLE(ab, cd, 2, 3, 6, 7);
#endif
}

// The same, but not as an operand that the compiler reads from memory at each of its uses.
template <typename V>
inline V in_register(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// Fetches what is about to be read. Always inlined: of a function that does nothing but fetch, GCC
// may take a call for one without effect, and drop it.
inline __attribute__((always_inline)) void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(row) + i);
  }
}

// Fetches what is read a while later. Into the second-level cache more lines can be on their way
// than to the first level: with AVX2 on an EPYC, decoding by it reads 1.3 times as many bytes a
// second. On processors with AVX-512 (measured on Zen 5) the first level is ahead, by 1.0 to 1.3
// times.
inline __attribute__((always_inline)) void fetch(const void* line) {
  __builtin_prefetch(line, 0, LONGROPE_ISA_BYTES == 64 ? 3 : 2);
}

inline __attribute__((always_inline)) void fetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) fetch(static_cast<const char*>(row) + i);
}

// Stores a register past the caches; the address is on a register's boundary.
inline void stream_words(void* y, Words v) {
#if LONGROPE_ISA_BYTES == 64
  _mm512_stream_si512(static_cast<__m512i*>(y), (__m512i)v);
#elif LONGROPE_ISA_BYTES == 32
  _mm256_stream_si256(static_cast<__m256i*>(y), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(y), (__m128i)v);
#else
  store_as(y, v);
#endif
}

// Copies whole cache lines past the caches, to a line's boundary.
inline void stream_row(const void* from, void* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LONGROPE_ISA_BYTES) {
    stream_words(static_cast<char*>(to) + i, load_as<Words>(static_cast<const char*>(from) + i));
  }
}
