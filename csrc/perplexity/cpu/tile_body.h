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
