// Vectors of one register and the functions of the softmax (no include guard: part of a body).
//
// The compiler's vector extensions give one body for every instruction set; comparisons are written
// so that NaN survives them.

template <typename Real>
struct Vector;

template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(LONGROPE_ISA_BYTES)));
  typedef float Unaligned __attribute__((vector_size(LONGROPE_ISA_BYTES), aligned(4), may_alias));
  typedef int32_t Integer __attribute__((vector_size(LONGROPE_ISA_BYTES)));
  static constexpr int kLanes = LONGROPE_ISA_BYTES / sizeof(float);
};

template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(LONGROPE_ISA_BYTES)));
  typedef double Unaligned __attribute__((vector_size(LONGROPE_ISA_BYTES), aligned(8), may_alias));
  typedef int64_t Integer __attribute__((vector_size(LONGROPE_ISA_BYTES)));
  static constexpr int kLanes = LONGROPE_ISA_BYTES / sizeof(double);
};

typedef uint32_t Bits __attribute__((vector_size(LONGROPE_ISA_BYTES)));
typedef uint32_t BitsUnaligned
    __attribute__((vector_size(LONGROPE_ISA_BYTES), aligned(2), may_alias));
typedef uint16_t HalfBits __attribute__((vector_size(LONGROPE_ISA_BYTES / 2)));
typedef uint16_t HalfBitsUnaligned
    __attribute__((vector_size(LONGROPE_ISA_BYTES / 2), aligned(2), may_alias));

template <typename Real>
using VectorOf = typename Vector<Real>::Type;

template <typename Real>
inline VectorOf<Real> load_vector(const Real* x) {
  return *reinterpret_cast<const typename Vector<Real>::Unaligned*>(x);
}

template <typename Real>
inline void store_vector(Real* y, VectorOf<Real> value) {
  *reinterpret_cast<typename Vector<Real>::Unaligned*>(y) = value;
}

// Probabilities to bfloat16, to nearest. NaN may become zero here: the sum of the row keeps it.
inline void store_vector(BFloat16* y, VectorOf<float> value) {
  const Bits bits = (reinterpret_cast<Bits>(value) + 0x8000) >> 16;
  *reinterpret_cast<HalfBitsUnaligned*>(y) = __builtin_convertvector(bits, HalfBits);
}

// Two rows of bfloat16, element by element in pairs, rounded likewise.
inline void store_pairs(BFloat16* y, VectorOf<float> first, VectorOf<float> second) {
  const Bits low = (reinterpret_cast<Bits>(first) + 0x8000) >> 16;
  const Bits high = (reinterpret_cast<Bits>(second) + 0x8000) & 0xffff0000u;
  *reinterpret_cast<BitsUnaligned*>(y) = low | high;
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
inline VectorOf<float> greater<float>(VectorOf<float> a, VectorOf<float> b) {
  return _mm512_max_ps(a, b);
}
template <>
inline float horizontal_max<float>(VectorOf<float> x) {
  return _mm512_reduce_max_ps(x);
}
template <>
inline float horizontal_sum<float>(VectorOf<float> x) {
  return _mm512_reduce_add_ps(x);
}
#endif

// 2^x for x <= 127; 0 below -126.5. Relative error 1.6e-7.
inline VectorOf<float> exp2(VectorOf<float> x) {
  using V = VectorOf<float>;
  x = greater<float>(broadcast(-127.0f), x);
  // 1.5 * 2^23 + 127: adding it rounds to an integer, whose exponent then lies in the low bits.
  const V magic = broadcast(12583039.0f);
  const V rounded = x + magic;
  const V f = x - (rounded - magic);
  // Minimax of degree 5 for the relative error on [-1/2, 1/2], exact at 0 (Lawson's iteration).
  V y = broadcast(1.32647273e-3f);
  y = y * f + broadcast(9.67151299e-3f);
  y = y * f + broadcast(5.55073358e-2f);
  y = y * f + broadcast(2.40222424e-1f);
  y = y * f + broadcast(6.93147004e-1f);
  y = y * f + broadcast(1.0f);
  return y * reinterpret_cast<V>(reinterpret_cast<Bits>(rounded) << 23);
}

inline VectorOf<double> exp2(VectorOf<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

inline VectorOf<float> tanh(VectorOf<float> x) {
  using V = VectorOf<float>;
  const V magnitude = x < V{} ? -x : x;
  const V e = exp2(magnitude * broadcast(-2.88539008f));  // exp(-2 |x|)
  V large = (broadcast(1.0f) - e) / (broadcast(1.0f) + e);
  large = x < V{} ? -large : large;
  // tanh(x) = x + x z P(z), z = x^2, minimax of degree 4 on |x| <= 0.625.
  const V z = x * x;
  V small = broadcast(-5.71704531e-3f);
  small = small * z + broadcast(2.06505876e-2f);
  small = small * z + broadcast(-5.37434982e-2f);
  small = small * z + broadcast(1.33314913e-1f);
  small = small * z + broadcast(-3.33332839e-1f);
  small = x + x * z * small;
  return magnitude < broadcast(0.625f) ? small : large;
}

inline VectorOf<double> tanh(VectorOf<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
