// One row (a token of a head) turned, for one instruction set (no include guard: part of a body).
//
// bfloat16 comes in words of two: the even element shifted up and the odd one masked are floats, so
// that widening and narrowing need no permutation. Even and odd pairs then lie in different
// registers, and the table is stored in that order (table_slot).

typedef float Floats __attribute__((vector_size(LONGROPE_ISA_BYTES)));
typedef uint32_t Words __attribute__((vector_size(LONGROPE_ISA_BYTES)));
constexpr int kLanes = LONGROPE_ISA_BYTES / 4;

template <typename V>
inline V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V>
inline void store_as(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Stores a register past the caches; the address is on a register's boundary.
inline void stream_words(void* p, Words v) {
#if LONGROPE_ISA_BYTES == 64
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif LONGROPE_ISA_BYTES == 32
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store_as(p, v);
#endif
}

// Copies whole cache lines past the caches, to a line's boundary.
inline void stream_row(const void* from, void* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LONGROPE_ISA_BYTES) {
    stream_words(static_cast<char*>(to) + i, load_as<Words>(static_cast<const char*>(from) + i));
  }
}

// Where the cosine and sine of pair i stand in a row of the table.
template <typename T, bool kInterleaved>
int64_t table_slot(int64_t, int64_t i) {
  return i;
}
template <>
inline int64_t table_slot<BFloat16, false>(int64_t pairs, int64_t i) {
  const int64_t group = i / (2 * kLanes) * (2 * kLanes);
  if (group + 2 * kLanes > pairs) return i;  // the last ones, turned one by one
  const int64_t within = i - group;
  return group + within % 2 * kLanes + within / 2;
}

// y = rotation(x) of the pairs [begin, pairs) of one row; x and y may be the same memory.
template <bool kInterleaved, typename X, typename Y, typename Value>
void rotate_pairs(const X* x, Y* y, const Value* cos, const Value* sin, int64_t begin,
                  int64_t pairs) {
#pragma omp simd
  for (int64_t i = begin; i < pairs; ++i) {
    const int64_t first = kInterleaved ? 2 * i : i;
    const int64_t second = kInterleaved ? 2 * i + 1 : i + pairs;
    const Value x1 = load(x[first]), x2 = load(x[second]);
    store(&y[first], x1 * cos[i] - x2 * sin[i]);
    store(&y[second], x2 * cos[i] + x1 * sin[i]);
  }
}

// A whole row; `row` is room for the 2 * pairs values of one row.
template <bool kInterleaved, typename T, typename Value>
void rotate_row(const T* x, T* y, const Value* cos, const Value* sin, int64_t pairs, Value*) {
  rotate_pairs<kInterleaved>(x, y, cos, sin, 0, pairs);
}

// float16 goes through floats.
template <bool kInterleaved>
void rotate_row(const Float16* x, Float16* y, const float* cos, const float* sin, int64_t pairs,
                float* row) {
  load_row(x, row, 2 * pairs);
  rotate_pairs<kInterleaved>(row, row, cos, sin, 0, pairs);
  store_row(row, y, 2 * pairs);
}

inline Floats even_values(Words x) { return (Floats)(x << 16); }
inline Floats odd_values(Words x) { return (Floats)(x & 0xffff0000u); }

// Two vectors rounded to nearest even. NaN stays NaN without a test: what arithmetic makes of a
// widened bfloat16, or makes anew, has no bits that rounding would carry from.
inline Words rounded_words(Floats even, Floats odd) {
  const Words e = (Words)even, o = (Words)odd;
  const Words low = (e + 0x7fffu + (e >> 16 & 1u)) >> 16;
  const Words high = o + 0x7fffu + (o >> 16 & 1u);
  return low | (high & 0xffff0000u);
}

// With kStream, registers go past the caches: then y is on a cache line and the pairs elements of
// either half are whole lines.
template <bool kInterleaved, bool kStream = false>
void rotate_row(const BFloat16* x, BFloat16* y, const float* cos, const float* sin, int64_t pairs,
                float*) {
  const auto put = [](BFloat16* p, Words words) {
    if constexpr (kStream) {
      stream_words(p, words);
    } else {
      store_as(p, words);
    }
  };
  int64_t i = 0;
  if constexpr (kInterleaved) {
    for (; i + kLanes <= pairs; i += kLanes) {
      const Words both = load_as<Words>(x + 2 * i);
      const Floats x1 = even_values(both), x2 = odd_values(both);
      const Floats c = load_as<Floats>(cos + i), s = load_as<Floats>(sin + i);
      put(y + 2 * i, rounded_words(x1 * c - x2 * s, x2 * c + x1 * s));
    }
  } else {
    for (; i + 2 * kLanes <= pairs; i += 2 * kLanes) {
      const Words first = load_as<Words>(x + i), second = load_as<Words>(x + i + pairs);
      Floats c = load_as<Floats>(cos + i), s = load_as<Floats>(sin + i);
      Floats x1 = even_values(first), x2 = even_values(second);
      const Floats even1 = x1 * c - x2 * s, even2 = x2 * c + x1 * s;
      c = load_as<Floats>(cos + i + kLanes), s = load_as<Floats>(sin + i + kLanes);
      x1 = odd_values(first), x2 = odd_values(second);
      put(y + i, rounded_words(even1, x1 * c - x2 * s));
      put(y + i + pairs, rounded_words(even2, x2 * c + x1 * s));
    }
  }
  rotate_pairs<kInterleaved>(x, y, cos, sin, i, pairs);
}

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}
