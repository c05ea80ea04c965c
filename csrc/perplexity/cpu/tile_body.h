// What is done to a tile of logits [m vocabulary rows][n tokens] after the matrix product, n a
// multiple of 16. Tokens run along the vector lanes, so that a maximum or a sum over the vocabulary
// needs no reduction within a register. Compiled once per instruction set (foreach_isa.h); float
// through vectors of the compiler, double (gradcheck) through the same formulas one by one.

typedef float Floats __attribute__((vector_size(LONGROPE_ISA_BYTES)));
typedef uint32_t Words __attribute__((vector_size(LONGROPE_ISA_BYTES)));
typedef int32_t Ints __attribute__((vector_size(LONGROPE_ISA_BYTES)));
constexpr int kLanes = LONGROPE_ISA_BYTES / 4;

#define LONGROPE_INLINE static inline __attribute__((always_inline))

template <class To, class From>
LONGROPE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
LONGROPE_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
LONGROPE_INLINE void store_as(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// exp(x) = 2^n (1 + r + r^2 q(r)), n = round(x / ln 2), |r| <= ln 2 / 2. q is the polynomial of
// degree 4 with the least relative error (3e-9, a twentieth of a rounding), found by iteratively
// reweighted least squares. Exact to about one rounding for x in [-87.3, 88]; below: 0; NaN stays.
struct ExpParts {
  Floats power;   // 2^n
  Floats excess;  // exp(r) - 1
};

LONGROPE_INLINE ExpParts exp_parts(Floats x) {
  const float magic = 0x1.8p23f;  // adding it leaves the rounded integer in the low bits
  const Floats shifted = x * 0x1.715476p0f + magic;
  const Floats n = shifted - magic;
  Floats r = x - n * 0x1.62e4p-1f;  // ln 2, upper 15 bits: n * this is exact
  r = r - n * 0x1.7f7d1cp-20f;      // ln 2, the rest
  Floats q = 0x1.6a23cep-10f * r + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Words exponent = (bits_as<Words>(shifted) << 23) + 0x3f800000u;
  return {bits_as<Floats>(exponent), q * (r * r) + r};
}

LONGROPE_INLINE Floats exponential(Floats x) {
  const ExpParts e = exp_parts(x);
  const Floats value = e.power + e.power * e.excess;
  const Floats zero = {};
  return x < -87.33654f ? zero : value;  // exp(-87.33654) is the smallest normal float
}

// tanh(x) = t / (t + 2), t = exp(2x) - 1, each term rounded once also where x is small.
LONGROPE_INLINE Floats hyperbolic_tangent(Floats x) {
  // tanh(10) rounds to 1; the comparisons are false for NaN, which stays.
  const Floats bound = Floats{} + 10.0f;
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const ExpParts e = exp_parts(x + x);
  const Floats t = (e.power - 1.0f) + e.power * e.excess;
  return t / (t + 2.0f);
}

LONGROPE_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
LONGROPE_INLINE Floats nothing_if_empty(Floats m) {
  const Floats zero = {};
  return m == -__builtin_inff() ? zero : m;
}

// logits -> softcap * tanh(logits / softcap), in place.
static inline void softcap_tile(float* tile, int64_t m, int64_t n, double softcap) {
  const float cap = static_cast<float>(softcap), inverse = static_cast<float>(1.0 / softcap);
  for (int64_t i = 0; i < m * n; i += kLanes) {
    store_as(tile + i, hyperbolic_tangent(load_as<Floats>(tile + i) * inverse) * cap);
  }
}

static inline void softcap_tile(double* tile, int64_t m, int64_t n, double softcap) {
  for (int64_t i = 0; i < m * n; ++i) tile[i] = softcap * std::tanh(tile[i] / softcap);
}

// Adds the tile to the running statistics of its n tokens: sum holds sum(exp(logit - max)) over
// the vocabulary rows seen so far. Where all of them are -inf, max is -inf and sum is 0.
static inline void add_to_statistics(const float* tile, int64_t m, int64_t n, float* max,
                                     float* sum) {
  constexpr int kVectors = 64 / LONGROPE_ISA_BYTES;  // 16 tokens, one cache line, at a time
  for (int64_t c = 0; c < n; c += 16) {
    Floats before[kVectors], now[kVectors], other[kVectors], total[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      before[j] = now[j] = other[j] = load_as<Floats>(max + c + j * kLanes);
    }
    int64_t v = 0;
    for (; v + 2 <= m; v += 2) {
      for (int j = 0; j < kVectors; ++j) {
        now[j] = larger(load_as<Floats>(tile + v * n + c + j * kLanes), now[j]);
        other[j] = larger(load_as<Floats>(tile + (v + 1) * n + c + j * kLanes), other[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      if (v < m) now[j] = larger(load_as<Floats>(tile + v * n + c + j * kLanes), now[j]);
      now[j] = larger(other[j], now[j]);
      store_as(max + c + j * kLanes, now[j]);
      now[j] = nothing_if_empty(now[j]);
      total[j] = Floats{};
    }
    for (v = 0; v < m; ++v) {
      for (int j = 0; j < kVectors; ++j) {
        total[j] += exponential(load_as<Floats>(tile + v * n + c + j * kLanes) - now[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      const Floats old = load_as<Floats>(sum + c + j * kLanes);
      store_as(sum + c + j * kLanes, old * exponential(before[j] - now[j]) + total[j]);
    }
  }
}

static inline void add_to_statistics(const double* tile, int64_t m, int64_t n, double* max,
                                     double* sum) {
  for (int64_t c = 0; c < n; ++c) {
    double now = max[c], total = 0.0;
    for (int64_t v = 0; v < m; ++v) now = tile[v * n + c] > now ? tile[v * n + c] : now;
    const double base = now == -__builtin_inf() ? 0.0 : now;
    for (int64_t v = 0; v < m; ++v) total += std::exp(tile[v * n + c] - base);
    sum[c] = sum[c] * std::exp(max[c] - base) + total;
    max[c] = now;
  }
}

// Raw logits -> d loss / d raw logits, in place. `target` is relative to the tile's first row.
static inline void gradient_tile(float* tile, int64_t m, int64_t n, const float* max,
                                 const float* log_sum, const float* grad, const int32_t* target,
                                 double softcap) {
  const float cap = static_cast<float>(softcap);
  const float inverse = softcap == 0.0 ? 0.0f : static_cast<float>(1.0 / softcap);
  const Floats one = Floats{} + 1.0f, zero = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const Floats top = load_as<Floats>(max + c), rest = load_as<Floats>(log_sum + c);
    const Floats g = load_as<Floats>(grad + c);
    const Ints hit = load_as<Ints>(target + c);
    for (int64_t v = 0; v < m; ++v) {
      float* at = tile + v * n + c;
      Floats x = load_as<Floats>(at), slope = one;
      if (softcap != 0.0) {
        const Floats t = hyperbolic_tangent(x * inverse);
        x = t * cap;
        slope = one - t * t;
      }
      const Floats onehot = hit == static_cast<int32_t>(v) ? one : zero;
      store_as(at, (exponential((x - top) - rest) - onehot) * g * slope);
    }
  }
}

static inline void gradient_tile(double* tile, int64_t m, int64_t n, const double* max,
                                 const double* log_sum, const double* grad, const int32_t* target,
                                 double softcap) {
  for (int64_t v = 0; v < m; ++v) {
    for (int64_t c = 0; c < n; ++c) {
      double x = tile[v * n + c], slope = 1.0;
      if (softcap != 0.0) {
        const double t = std::tanh(x / softcap);
        x = t * softcap;
        slope = 1.0 - t * t;
      }
      const double onehot = target[c] == v ? 1.0 : 0.0;
      tile[v * n + c] = (std::exp((x - max[c]) - log_sum[c]) - onehot) * grad[c] * slope;
    }
  }
}

// C[m, n] = A[m, k] B[k, n] (added to C where `add`), for float64, whose only use is gradcheck.
static inline void double_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc,
                                  bool add, const double* a, const double* b, double* c) {
  for (int64_t i = 0; i < m; ++i) {
    double* row = c + i * ldc;
    if (!add) {
      for (int64_t j = 0; j < n; ++j) row[j] = 0.0;
    }
    for (int64_t p = 0; p < k; ++p) {
      const double x = a[i * lda + p];
      for (int64_t j = 0; j < n; ++j) row[j] += x * b[p * n + j];
    }
  }
}
