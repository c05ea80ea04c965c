// Products of few rows with keys and values that are read from where they lie and widened in
// registers (no include guard: part of a body).

// Elements that one load brings, widened to so many vectors.
template <typename T>
struct Chunk {
  static constexpr int kVectors = 1;
  static constexpr int kElements = Vector<float>::kLanes;

  // Where lane `lane` of vector `vector` stands.
  static int64_t place(int, int lane) { return lane; }
  static void load(const T* x, Floats* y) {
    if constexpr (std::is_same_v<T, float>) {
      y[0] = load_vector(x);
    } else {
      load_row(x, reinterpret_cast<float*>(y), kElements);
    }
  }
};

// One instruction widens every other element: those stand beside each other.
template <>
struct Chunk<BFloat16> {
  static constexpr int kVectors = 2;
  static constexpr int kElements = 2 * Vector<float>::kLanes;

  static int64_t place(int vector, int lane) { return 2 * lane + vector; }
  static void load(const BFloat16* x, Floats* y) {
    const Words pairs = load_as<Words>(x);
    y[0] = bits_as_floats(pairs << 16);
    y[1] = bits_as_floats(pairs & 0xffff0000u);
  }
};

// A row of head_dim elements in chunks. Where they do not divide it, the last one begins
// `overlap` elements early, so that nothing is read beyond the row.
template <typename T>
struct Chunks {
  static constexpr int kElements = Chunk<T>::kElements;
  int64_t whole, last, overlap;
  uint32_t kept[kElements];  // of the last chunk's lanes: all bits of those that do not overlap

  explicit Chunks(int64_t head_dim)
      : whole(head_dim / kElements),
        last(head_dim - kElements),
        overlap(head_dim % kElements ? kElements - head_dim % kElements : 0) {
    for_places(whole, [&](int64_t, bool again, int64_t i) {
      kept[i - whole * kElements] = again ? 0 : 0xffffffffu;
    });
  }

  int64_t count() const { return whole + (overlap > 0); }

  // Zero in the last chunk's lanes that overlap: of keys and of queries, since zeros of the ones do
  // not cancel infinities of the others.
  void keep(Floats& x, int vector) const {
    constexpr int kLanes = Vector<float>::kLanes;
    x = bits_as_floats(bits_as_words(x) & load_as<Words>(kept + vector * kLanes));
  }

  // From the order of memory to that of the vectors, zero where the last chunk overlaps.
  void arrange(const float* row, float* y) const {
    if (Chunk<T>::kVectors == 1) __builtin_memcpy(y, row, whole * kElements * sizeof(float));
    for_places(Chunk<T>::kVectors == 1 ? whole : 0,
               [&](int64_t at, bool again, int64_t i) { y[i] = again ? 0 : row[at]; });
  }

  // And back.
  void restore(const float* x, float* row) const {
    for_places(0, [&](int64_t at, bool again, int64_t i) {
      if (!again) row[at] = x[i];
    });
  }

 private:
  // From a chunk on calls visit(element, whether an earlier chunk has it, index among the vectors'
  // lanes).
  template <typename Visit>
  void for_places(int64_t chunk, const Visit& visit) const {
    constexpr int kLanes = Vector<float>::kLanes;
    for (int64_t c = chunk; c < count(); ++c) {
      const int64_t first = c < whole ? c * kElements : last, seen = c < whole ? 0 : overlap;
      for (int i = 0; i < kElements; ++i) {
        const int64_t place = Chunk<T>::place(i / kLanes, i % kLanes);
        visit(first + place, place < seen, c * kElements + i);
      }
    }
  }
};

// The sums of every row and key, scores[r][j]; keys beyond a multiple of kKeys have room there.
template <int kRows, int kKeys>
inline void store_scores(const Floats (&sum)[kRows][kKeys], float* s, int64_t s_stride) {
  // Two rows of two keys, or four keys of a row, are reduced together.
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r += kKeys == 2 ? 2 : 1) {
    if constexpr (kKeys == 2) {
      const int other = r + 1 < kRows ? r + 1 : r;
      const auto sums = horizontal_sums(sum[r][0], sum[r][1], sum[other][0], sum[other][1]);
      store_as(s + r * s_stride, Lanes<2>::Floats{sums[0], sums[1]});
      store_as(s + other * s_stride, Lanes<2>::Floats{sums[2], sums[3]});
    } else {
      static_assert(kKeys % 4 == 0);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; j += 4) {
        store_as(s + r * s_stride + j,
                 horizontal_sums(sum[r][j], sum[r][j + 1], sum[r][j + 2], sum[r][j + 3]));
      }
    }
  }
}

// scores[r][j] = q_r . k_j of kRows rows, arranged, and kKeys keys.
template <int kRows, int kKeys, typename T>
inline void streamed_scores(const Chunks<T>& chunks, const float* q, int64_t q_stride,
                            const T* const* keys, float* s, int64_t s_stride) {
  constexpr int kVectors = Chunk<T>::kVectors, kLanes = Vector<float>::kLanes;
  Floats sum[kRows][kKeys];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) sum[r][j] = Floats{};
  }
  const auto add = [&](int64_t at, const auto& load) __attribute__((always_inline)) {
    Floats key[kKeys][kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) load(keys[j] + at, key[j]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Floats row = in_register(load_vector(q + r * q_stride + v * kLanes));
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) sum[r][j] += row * key[j][v];
      }
    }
    q += kVectors * kLanes;
  };
  for (int64_t c = 0; c < chunks.whole; ++c) {
    add(c * Chunk<T>::kElements,
        [](const T* x, Floats* y) __attribute__((always_inline)) { Chunk<T>::load(x, y); });
  }
  if (chunks.overlap > 0) {
    add(chunks.last, [&](const T* x, Floats* y) __attribute__((always_inline)) {
      Chunk<T>::load(x, y);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) chunks.keep(y[v], v);
    });
  }
  store_scores<kRows, kKeys>(sum, s, s_stride);
}

// o_r = alpha_r o_r + sum over j of p[r][j] v_j of kRows rows, arranged, and kChunks chunks.
// Fetches as many bytes from `fetched` on, where given, as it reads of v.
template <int kRows, int kChunks, typename T>
inline void streamed_values(const T* v, int64_t stride, int64_t count, const float* p,
                            int64_t p_stride, float* o, int64_t o_stride, const float* alpha,
                            const char* fetched) {
  constexpr int kVectors = Chunk<T>::kVectors, kLanes = Vector<float>::kLanes;
  constexpr int kElements = Chunk<T>::kElements, kBytes = kChunks * kElements * sizeof(T);
  Floats sum[kRows][kChunks][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) {
#pragma GCC unroll 16
      for (int x = 0; x < kVectors; ++x) sum[r][c][x] = Floats{};
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    Floats value[kChunks][kVectors];
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) Chunk<T>::load(v + c * kElements, value[c]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats weight = broadcast(p[r * p_stride + j]);
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) {
#pragma GCC unroll 16
        for (int x = 0; x < kVectors; ++x) sum[r][c][x] += weight * value[c][x];
      }
    }
    v += stride;
    if (!fetched) continue;
#pragma GCC unroll 16
    for (int i = 0; i < kBytes; i += kCacheLine) fetch(fetched + i);
    fetched += kBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChunks * kVectors; ++i) {
      float* const y = o + r * o_stride + i * kLanes;
      store_vector(y, load_vector(y) * alpha[r] + sum[r][i / kVectors][i % kVectors]);
    }
  }
}

// kLanes elements in the order of memory.
template <typename T>
inline Floats widen(const T* x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bits_as_floats(__builtin_convertvector(load_as<Halves>(x), Words) << 16);
  } else {
    Floats y;
    Chunk<T>::load(x, &y);
    return y;
  }
}

// A key by one row of a table, to floats.
template <typename T>
inline void turn_key(const T* x, const AttentionTable& table, const float* cos, const float* sin,
                     int64_t head_dim, float* y) {
  constexpr int64_t kLanes = Vector<float>::kLanes;
  const int64_t pairs = table.pairs;
  if (table.interleaved || pairs % kLanes) {
    load_row(x, y, head_dim);
    return rotate_row(y, cos, sin, pairs, table.interleaved);
  }
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const Floats c = load_vector(cos + i), s = load_vector(sin + i);
    const Floats x1 = widen(x + i), x2 = widen(x + pairs + i);
    store_vector(y + i, x1 * c - x2 * s);
    store_vector(y + pairs + i, x2 * c + x1 * s);
  }
  if (2 * pairs < head_dim) load_row(x + 2 * pairs, y + 2 * pairs, head_dim - 2 * pairs);
}

// Whether turned_scores takes rows of this size.
inline bool turns_in_registers(const AttentionTable& table, int64_t head_dim) {
  constexpr int64_t kLanes = Vector<float>::kLanes;
  const int64_t rest = head_dim - 2 * table.pairs;
  return !table.interleaved && table.pairs >= kLanes && (rest == 0 || rest >= kLanes);
}

// As streamed_scores, of keys that turn by the rows of cos and sin; q in the order of memory. The
// chunks are those of the pairs, and of the elements behind them, which do not turn.
template <int kRows, int kKeys, typename T>
inline void turned_scores(const Chunks<float>& pair_chunks, const Chunks<float>& rest_chunks,
                          int64_t pairs, const float* q, int64_t q_stride, const T* const* keys,
                          const float* cos, const float* sin, float* s, int64_t s_stride) {
  constexpr int64_t kLanes = Vector<float>::kLanes;
  Floats sum[kRows][kKeys];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) sum[r][j] = Floats{};
  }
  const auto multiply = [&](int64_t at, const Floats(&key)[kKeys], const auto& keep)
                            __attribute__((always_inline)) {
#pragma GCC unroll 16
                              for (int r = 0; r < kRows; ++r) {
                                Floats row = load_vector(q + r * q_stride + at);
                                keep(row);
                                row = in_register(row);
#pragma GCC unroll 16
                                for (int j = 0; j < kKeys; ++j) sum[r][j] += row * key[j];
                              }
                            };
  const auto turn = [&](int64_t i, const auto& keep) __attribute__((always_inline)) {
    Floats first[kKeys], second[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const Floats c = load_vector(cos + j * pairs + i), d = load_vector(sin + j * pairs + i);
      const Floats x1 = widen(keys[j] + i), x2 = widen(keys[j] + pairs + i);
      first[j] = x1 * c - x2 * d;
      second[j] = x2 * c + x1 * d;
      keep(first[j]);
      keep(second[j]);
    }
    multiply(i, first, keep);
    multiply(pairs + i, second, keep);
  };
  const auto pass = [&](int64_t i, const auto& keep) __attribute__((always_inline)) {
    Floats key[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      key[j] = widen(keys[j] + i);
      keep(key[j]);
    }
    multiply(i, key, keep);
  };
  const auto all = [](Floats&) __attribute__((always_inline)) {};
  for (int64_t c = 0; c < pair_chunks.whole; ++c) turn(c * kLanes, all);
  if (pair_chunks.overlap > 0) {
    turn(pair_chunks.last,
         [&](Floats& x) __attribute__((always_inline)) { pair_chunks.keep(x, 0); });
  }
  for (int64_t c = 0; c < rest_chunks.whole; ++c) pass(2 * pairs + c * kLanes, all);
  if (rest_chunks.overlap > 0) {
    pass(2 * pairs + rest_chunks.last,
         [&](Floats& x) __attribute__((always_inline)) { rest_chunks.keep(x, 0); });
  }
  store_scores<kRows, kKeys>(sum, s, s_stride);
}
