// One row (a token of a head) turned, for one instruction set (no include guard: part of a body).
//
// bfloat16 comes in words of two: the even element shifted up and the odd one masked are floats, so
// that widening and narrowing need no permutation. Even and odd pairs then lie in different
// registers, and the table is stored in that order (table_slot).

constexpr int kLanes = Vector<float>::kLanes;

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

inline Floats load_floats(const Float16* x) {
  Floats y;
  load_row(x, reinterpret_cast<float*>(&y), kLanes);
  return y;
}

inline void store_floats(Floats x, Float16* y) {
  store_row(reinterpret_cast<const float*>(&x), y, kLanes);
}

// float16 goes through floats: in registers, or where these do not divide a row through `row`.
template <bool kInterleaved>
void rotate_row(const Float16* x, Float16* y, const float* cos, const float* sin, int64_t pairs,
                float* row) {
  if (kInterleaved || pairs % kLanes) {
    load_row(x, row, 2 * pairs);
    rotate_pairs<kInterleaved>(row, row, cos, sin, 0, pairs);
    return store_row(row, y, 2 * pairs);
  }
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const Floats x1 = load_floats(x + i), x2 = load_floats(x + i + pairs);
    const Floats c = load_vector(cos + i), s = load_vector(sin + i);
    store_floats(x1 * c - x2 * s, y + i);
    store_floats(x2 * c + x1 * s, y + i + pairs);
  }
}

template <typename V>
inline auto even_values(V words) {
  return bits_as_floats(words << 16);
}
template <typename V>
inline auto odd_values(V words) {
  return bits_as_floats(words & 0xffff0000u);
}

// To nearest even, the result in the upper half. NaN stays NaN without a test: what arithmetic
// makes of a widened bfloat16, or makes anew, has no bits that rounding would carry from.
template <typename V>
inline auto rounded(V values) {
  const auto words = bits_as_words(values);
  return words + 0x7fffu + (words >> 16 & 1u);
}

template <typename V>
inline auto rounded_words(V even, V odd) {
  return with_upper_halves(rounded(even) >> 16, rounded(odd));
}

// kWidth interleaved pairs.
template <int kWidth>
inline typename Lanes<kWidth>::Words rotated_words(const BFloat16* x, const float* cos,
                                                   const float* sin) {
  using Floats = typename Lanes<kWidth>::Floats;
  const auto both = load_as<typename Lanes<kWidth>::Words>(x);
  const Floats x1 = even_values(both), x2 = odd_values(both);
  const Floats c = load_as<Floats>(cos), s = load_as<Floats>(sin);
  return rounded_words(x1 * c - x2 * s, x2 * c + x1 * s);
}

// kWidth pairs (x[i], x[i + pairs]) in their own order.
template <int kWidth>
inline void rotate_columns(const BFloat16* x, BFloat16* y, const float* cos, const float* sin,
                           int64_t pairs) {
  using Floats = typename Lanes<kWidth>::Floats;
  using Words = typename Lanes<kWidth>::Words;
  using Halves = typename Lanes<kWidth>::Halves;
  const Floats x1 = even_values(__builtin_convertvector(load_as<Halves>(x), Words));
  const Floats x2 = even_values(__builtin_convertvector(load_as<Halves>(x + pairs), Words));
  const Floats c = load_as<Floats>(cos), s = load_as<Floats>(sin);
  const Floats y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s;
  store_as(y, __builtin_convertvector(rounded(y1) >> 16, Halves));
  store_as(y + pairs, __builtin_convertvector(rounded(y2) >> 16, Halves));
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
  constexpr int kHalf = kLanes / 2;
  int64_t i = 0;
  if constexpr (kInterleaved) {
    for (; i + kLanes <= pairs; i += kLanes) {
      put(y + 2 * i, rotated_words<kLanes>(x + 2 * i, cos + i, sin + i));
    }
    for (; i + kHalf <= pairs; i += kHalf) {
      store_as(y + 2 * i, rotated_words<kHalf>(x + 2 * i, cos + i, sin + i));
    }
  } else {
    for (; i + 2 * kLanes <= pairs; i += 2 * kLanes) {
      const Words first = load_as<Words>(x + i), second = load_as<Words>(x + i + pairs);
      Floats c = load_as<Floats>(cos + i), s = load_as<Floats>(sin + i);
      Floats x1 = even_values(first), x2 = even_values(second);
      const Floats even1 = x1 * c - x2 * s, even2 = x2 * c + x1 * s;
      c = load_as<Floats>(cos + i + kLanes), s = load_as<Floats>(sin + i + kLanes);
      x1 = odd_values(first), x2 = odd_values(second);
      put(y + i, rounded_words<Floats>(even1, x1 * c - x2 * s));
      put(y + i + pairs, rounded_words<Floats>(even2, x2 * c + x1 * s));
    }
    for (; i + kHalf <= pairs; i += kHalf) {
      rotate_columns<kHalf>(x + i, y + i, cos + i, sin + i, pairs);
    }
  }
  rotate_pairs<kInterleaved>(x, y, cos, sin, i, pairs);
}
