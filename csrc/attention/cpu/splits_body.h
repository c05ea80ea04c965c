// Merges the parts of the keys that a forward pass was split into (no include guard: part of a
// body).

// Rows of the splits, weighted by their share of the sum.
template <typename T>
inline void merge_rows(const AttentionParams& p, const AttentionPlan& plan, const void* workspace,
                       int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t rows = p.batch * p.heads * p.queries;
  const Real* const out = static_cast<const Real*>(workspace);
  const Real* const lse = out + plan.splits * rows * p.head_dim;
  for (int64_t r = begin; r < end; ++r) {
    Real most = -__builtin_inf();
    for (int64_t s = 0; s < plan.splits; ++s) {
      const Real x = lse[s * rows + r];
      most = x > most || x != x ? x : most;
    }
    const Real shift = most == -__builtin_inf() ? Real{0} : most;
    Real sum = 0;
    Real row[kMaxHeadDim] = {};
    for (int64_t s = 0; s < plan.splits; ++s) {
      const Real weight = natural_exp(lse[s * rows + r] - shift);
      const Real* const part = out + (s * rows + r) * p.head_dim;
      if (weight == 0) continue;
      sum += weight;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] += weight * part[d];
    }
    const Real inverse = sum == 0 ? 0 : 1 / sum;
    for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= inverse;
    static_cast<Real*>(p.lse)[r] =
        sum == 0 || most == __builtin_inf() ? most : shift + natural_log(sum);
    const int64_t query = r % p.queries, head = r / p.queries % p.heads;
    T* const y = static_cast<T*>(p.out.data) + r / p.queries / p.heads * p.out.batch_stride +
                 head * p.out.head_stride + query * p.out.token_stride;
    store_row(row, y, p.head_dim);
  }
}
