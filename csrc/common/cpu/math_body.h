// exp, exp2 and tanh of vectors (no include guard: part of a body). NaN stays NaN. Doubles, whose
// only use is gradcheck, go through the library one by one.

// 2^n (1 + excess): what is close to 1 keeps its distance from it.
struct Power {
  Floats scale, excess;
};

// 1.5 * 2^23 + 127: adding it rounds to an integer, whose exponent then lies in the low bits.
constexpr float kRounder = 0x1.8p23f + 127;

// 2^n e^r for |r| <= ln 2 / 2, from `rounded` = n + kRounder: e^r = 1 + r + r^2 q(r). q is the
// polynomial of degree 4 with the least relative error (3e-9, a twentieth of a rounding), found by
// iteratively reweighted least squares.
inline Power power_of(Floats rounded, Floats r) {
  Floats q = 0x1.6a23cep-10f * r + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  return {bits_as_floats(bits_as_words(rounded) << 23), q * (r * r) + r};
}

inline Power exp_power(Floats x) {
  const Floats rounded = x * static_cast<float>(kLog2E) + kRounder;
  const Floats n = rounded - kRounder;
  Floats r = x - n * 0x1.62e4p-1f;  // ln 2, upper 15 bits: n * this is exact
  r = r - n * 0x1.7f7d1cp-20f;      // ln 2, the rest
  return power_of(rounded, r);
}

// Exact to about one rounding for x in [-87.3, 88]; 0 below.
inline Floats exp(Floats x) {
  const Power p = exp_power(x);
  const Floats value = p.scale + p.scale * p.excess;
  return x < -87.33654f ? Floats{} : value;  // exp(-87.33654) is the smallest normal float
}

// 2^x for x <= 127; 0 below -126.5.
inline Floats exp2(Floats x) {
  x = greater<float>(broadcast(-127.0f), x);
  const Floats rounded = x + kRounder;
  const Power p = power_of(rounded, (x - (rounded - kRounder)) * static_cast<float>(kLn2));
  return p.scale + p.scale * p.excess;
}

// t / (t + 2), t = exp(2x) - 1, each term rounded once also where x is small.
inline Floats tanh(Floats x) {
  // tanh(10) rounds to 1; the comparisons are false for NaN, which stays.
  const Floats bound = broadcast(10.0f);
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const Power p = exp_power(x + x);
  const Floats t = (p.scale - 1.0f) + p.scale * p.excess;
  return t / (t + 2.0f);
}

inline VectorOf<double> exp(VectorOf<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

inline VectorOf<double> exp2(VectorOf<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

inline VectorOf<double> tanh(VectorOf<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// One by one.
inline float natural_log(float x) { return __builtin_logf(x); }
inline double natural_log(double x) { return __builtin_log(x); }
inline float natural_exp(float x) { return __builtin_expf(x); }
inline double natural_exp(double x) { return __builtin_exp(x); }
inline float natural_log1p(float x) { return __builtin_log1pf(x); }
inline double natural_log1p(double x) { return __builtin_log1p(x); }
