// merge_attention (no include guard: part of a body).

template <typename T>
inline void merge_pair(const AttentionMergeParams& p, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const Real lowest = -__builtin_inf();
  const auto at = [&p](const AttentionTensor& x, int64_t row) {
    return static_cast<T*>(x.data) + row / p.queries / p.heads * x.batch_stride +
           row / p.queries % p.heads * x.head_stride + row % p.queries * x.token_stride;
  };
  for (int64_t r = begin; r < end; ++r) {
    const Real lse_a = static_cast<const Real*>(p.lse_a)[r];
    const Real lse_b = static_cast<const Real*>(p.lse_b)[r];
    const Real more = lse_a > lse_b ? lse_a : lse_b, less = lse_a > lse_b ? lse_b : lse_a;
    // exp(less - more), with the limits at the infinities: equal ones share, else one takes all.
    const Real ratio = less == lowest ? Real{0} : more == less ? Real{1} : natural_exp(less - more);
    const Real sum = 1 + ratio;
    Real weight_a = (lse_a > lse_b ? 1 : ratio) / sum, weight_b = (lse_a > lse_b ? ratio : 1) / sum;
    if (lse_a == lowest) weight_a = 0;
    if (lse_b == lowest) weight_b = 0;
    static_cast<Real*>(p.lse)[r] = ratio == 0 ? more : more + natural_log(sum);
    Real row[kMaxHeadDim] = {}, part[kMaxHeadDim];
    if (weight_a != 0) {
      load_row(at(p.out_a, r), part, p.head_dim);
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] = weight_a * part[d];
    }
    if (weight_b != 0) {
      load_row(at(p.out_b, r), part, p.head_dim);
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] += weight_b * part[d];
    }
    store_row(row, at(p.out, r), p.head_dim);
  }
}
