// What is done to a tile of logits [m vocabulary rows][n tokens] after the matrix product, n a
// multiple of 16 (no include guard: part of a body). Tokens run along the vector lanes, so that a
// maximum or a sum over the vocabulary needs no reduction within a register.

// logits -> softcap * tanh(logits / softcap), in place.
template <typename Real>
inline void softcap_tile(Real* tile, int64_t m, int64_t n, double softcap) {
  const Real cap = softcap, inverse = 1.0 / softcap;
  for (int64_t i = 0; i < m * n; i += Vector<Real>::kLanes) {
    store_vector(tile + i, tanh(load_vector(tile + i) * inverse) * cap);
  }
}

// Adds the tile to the running statistics of its n tokens: sum holds sum(exp(logit - max)) over
// the vocabulary rows seen so far. Where all of them are -inf, max is -inf and sum is 0.
template <typename Real>
inline void add_to_statistics(const Real* tile, int64_t m, int64_t n, Real* max, Real* sum) {
  using V = VectorOf<Real>;
  constexpr int kLanes = Vector<Real>::kLanes;
  constexpr int kTokens = 16, kVectors = kTokens / kLanes;  // a cache line of floats at a time
  for (int64_t c = 0; c < n; c += kTokens) {
    V before[kVectors], now[kVectors], other[kVectors], total[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      before[j] = now[j] = other[j] = load_vector(max + c + j * kLanes);
    }
    int64_t v = 0;
    for (; v + 2 <= m; v += 2) {
      for (int j = 0; j < kVectors; ++j) {
        now[j] = greater<Real>(load_vector(tile + v * n + c + j * kLanes), now[j]);
        other[j] = greater<Real>(load_vector(tile + (v + 1) * n + c + j * kLanes), other[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      if (v < m) now[j] = greater<Real>(load_vector(tile + v * n + c + j * kLanes), now[j]);
      now[j] = greater<Real>(other[j], now[j]);
      store_vector(max + c + j * kLanes, now[j]);
      now[j] = now[j] == -broadcast<Real>(__builtin_inf()) ? V{} : now[j];
      total[j] = V{};
    }
    for (v = 0; v < m; ++v) {
      for (int j = 0; j < kVectors; ++j) {
        total[j] += exp(load_vector(tile + v * n + c + j * kLanes) - now[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      const V old = load_vector(sum + c + j * kLanes);
      store_vector(sum + c + j * kLanes, old * exp(before[j] - now[j]) + total[j]);
    }
  }
}

// Raw logits -> d loss / d raw logits, in place. `target` counts from the tile's first row.
template <typename Real>
inline void gradient_tile(Real* tile, int64_t m, int64_t n, const Real* max, const Real* log_sum,
                          const Real* grad, const Real* target, double softcap) {
  using V = VectorOf<Real>;
  const Real cap = softcap, inverse = softcap == 0.0 ? 0.0 : 1.0 / softcap;
  const V one = broadcast<Real>(1);
  for (int64_t c = 0; c < n; c += Vector<Real>::kLanes) {
    const V top = load_vector(max + c), rest = load_vector(log_sum + c);
    const V g = load_vector(grad + c), hit = load_vector(target + c);
    for (int64_t v = 0; v < m; ++v) {
      Real* const at = tile + v * n + c;
      V x = load_vector(at), slope = one;
      if (softcap != 0.0) {
        const V t = tanh(x * inverse);
        x = t * cap;
        slope = one - t * t;
      }
      const V onehot = hit == broadcast<Real>(v) ? one : V{};
      store_vector(at, (exp((x - top) - rest) - onehot) * g * slope);
    }
  }
}

// The largest of the m rows, for each token.
template <typename Real>
inline void maxima_of_tile(const Real* tile, int64_t m, int64_t n, Real* max) {
  using V = VectorOf<Real>;
  constexpr int kLanes = Vector<Real>::kLanes;
  constexpr int kTokens = 16, kVectors = kTokens / kLanes;  // a cache line of floats at a time
  for (int64_t c = 0; c < n; c += kTokens) {
    V even[kVectors], odd[kVectors];  // two chains hide the latency of the maximum
    for (int j = 0; j < kVectors; ++j) even[j] = odd[j] = load_vector(tile + c + j * kLanes);
    for (int64_t v = 1; v + 2 <= m; v += 2) {
      for (int j = 0; j < kVectors; ++j) {
        even[j] = greater<Real>(load_vector(tile + v * n + c + j * kLanes), even[j]);
        odd[j] = greater<Real>(load_vector(tile + (v + 1) * n + c + j * kLanes), odd[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      const V last = load_vector(tile + (m - 1) * n + c + j * kLanes);
      store_vector(max + c + j * kLanes, greater<Real>(last, greater<Real>(odd[j], even[j])));
    }
  }
}

// From the maxima of the tiles [tiles][stride] and those before them: the new ones, and what a sum
// relative to the old ones is scaled by.
template <typename Real>
inline void grown_maxima(const Real* tile_max, int64_t stride, int64_t tiles, int64_t n,
                         const Real* before, Real* now, Real* scale) {
  using V = VectorOf<Real>;
  for (int64_t c = 0; c < n; c += Vector<Real>::kLanes) {
    const V old = load_vector(before + c);
    V most = old;
    for (int64_t i = 0; i < tiles; ++i) {
      most = greater<Real>(most, load_vector(tile_max + i * stride + c));
    }
    store_vector(now + c, most);
    store_vector(scale + c, old == most ? broadcast<Real>(1) : exp(old - most));
  }
}

// Logits, capped where softcap is not 0, -> exp(logit - max), in place, times the slope of the cap;
// sum gets the exponentials' sum over the tile's rows.
template <typename Real>
inline void exponentiate_tile(Real* tile, int64_t m, int64_t n, const Real* max, double softcap,
                              Real* sum) {
  using V = VectorOf<Real>;
  const Real inverse = softcap == 0.0 ? 0.0 : 1.0 / softcap;
  for (int64_t c = 0; c < n; c += Vector<Real>::kLanes) {
    V top = load_vector(max + c), total{};
    top = top == -broadcast<Real>(__builtin_inf()) ? V{} : top;  // every logit so far is -inf
    for (int64_t v = 0; v < m; ++v) {
      Real* const at = tile + v * n + c;
      const V x = load_vector(at), power = exp(x - top);
      total += power;
      const V capped = x * inverse;
      store_vector(at, softcap == 0.0 ? power : power * (1 - capped * capped));
    }
    store_vector(sum + c, total);
  }
}

// Multiplies the columns of [rows][n], where one of the factors is not 1.
template <typename Real>
inline void scale_columns(Real* sums, int64_t rows, int64_t n, const Real* scale) {
  if (std::all_of(scale, scale + n, [](Real x) { return x == 1; })) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < n; c += Vector<Real>::kLanes) {
      Real* const at = sums + i * n + c;
      store_vector(at, load_vector(at) * load_vector(scale + c));
    }
  }
}
