// The forward pass (no include guard: part of a body). One task: a block of rows, the queries of
// all heads that share a key/value head, against the visible keys, a block of keys at a time:
//
//   S = Q K^T;  m' = max(m, max S);  P = exp(S - m');  l = l exp(m - m') + sum P
//   O = O exp(m - m') + P V,  the scaling in the epilogue of the product
//
// Keys and values are packed once for all rows of the task. Tiles outside the visible range are
// skipped, so that causal attention does half the work and a window only what it spans. Products
// are in Real; S and P are the block's [kBlockRows, kBlockKeys] in the second-level cache.

template <typename Real>
struct ForwardScratch {
  Real* q;       // [rows, head_dim] in groups of a tile's rows
  Real* k;       // [kBlockKeys, head_dim] transposed, in panels
  Real* v;       // [kBlockKeys, head_dim] in panels
  Real* s;       // [kBlockRows, kBlockKeys]: scores, then probabilities
  Real* o;       // [kBlockRows, padded head_dim], not yet divided by l
  Real* rows;    // a tile's rows or columns times head_dim
  Real* m;       // [kBlockRows] largest score so far, in powers of two
  Real* l;       // [kBlockRows] sum of 2^(score - m)
  Real* alpha;   // [kBlockRows] 2^(m before - m)
  Range* range;  // [kBlockRows] visible keys

  ForwardScratch(void* memory, int64_t head_dim, size_t* bytes) {
    Carver carve(memory);
    const int64_t padded = padded_columns<Real>(head_dim);
    q = carve.take<Real>(kBlockRows * head_dim);
    k = carve.take<Real>(kBlockKeys * head_dim);
    v = carve.take<Real>(kBlockKeys * padded);
    s = carve.take<Real>(kBlockRows * kBlockKeys);
    o = carve.take<Real>(kBlockRows * padded);
    rows = carve.take<Real>((Tile<Real>::kColumns + Tile<Real>::kRows) * padded);
    m = carve.take<Real>(kBlockRows);
    l = carve.take<Real>(kBlockRows);
    alpha = carve.take<Real>(kBlockRows);
    range = carve.take<Range>(kBlockRows);
    if (bytes) *bytes = carve.bytes();
  }
};

// One row of scores [begin, end) of a block to probabilities, and zeros in the rest of
// [zeros.begin, zeros.end). `factor` takes scores to powers of two.
template <typename Real>
inline void softmax_row(Real* s, int64_t begin, int64_t end, Range zeros, Real factor,
                        const Softcap<Real>& cap, Real& m, Real& l, Real& alpha) {
  using V = VectorOf<Real>;
  constexpr int64_t kLanes = Vector<Real>::kLanes;
  alpha = 1;
  if (begin >= end) {
    for (int64_t j = zeros.begin; j < zeros.end; ++j) s[j] = 0;
    return;
  }
  const int64_t first = begin / kLanes * kLanes, last = (end + kLanes - 1) / kLanes * kLanes;
  if (cap.on) {
    for (int64_t j = first; j < last; j += kLanes) store_vector(s + j, cap(load_vector(s + j)));
  }
  const Real lowest = -__builtin_inf();
  for (int64_t j = first; j < begin; ++j) s[j] = lowest;
  for (int64_t j = end; j < last; ++j) s[j] = lowest;
  V most = load_vector(s + first);
  for (int64_t j = first + kLanes; j < last; j += kLanes) {
    const V x = load_vector(s + j);
    most = x > most ? x : most;
  }
  const Real here = horizontal_max<Real>(most) * factor;
  const Real m_new = here > m ? here : m;
  // All scores -inf so far: any finite number in the place of m gives probabilities of 0.
  const Real shift = m_new == lowest ? Real{0} : m_new;
  V sum{};
  for (int64_t j = first; j < last; j += kLanes) {
    const V p = exp2(load_vector(s + j) * factor - shift);
    store_vector(s + j, p);
    sum += p;
  }
  alpha = exp2(broadcast<Real>(m - shift))[0];
  l = l * alpha + horizontal_sum<Real>(sum);
  m = m_new;
  for (int64_t j = zeros.begin; j < first; ++j) s[j] = 0;
  for (int64_t j = last; j < zeros.end; ++j) s[j] = 0;
}

// The softmax of row groups and the second product; `keys` is the block.
template <typename Real>
inline void forward_block(const ForwardScratch<Real>& x, int64_t rows, Range keys, int64_t head_dim,
                          Real factor, const Softcap<Real>& cap) {
  constexpr int64_t kRows = Tile<Real>::kRows, kColumns = Tile<Real>::kColumns;
  const int64_t padded = padded_columns<Real>(head_dim);
  for (int64_t t = 0; t < keys.end - keys.begin; t += kColumns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t here = rows - r < kRows ? rows - r : kRows;
      const Range group = group_range(x.range + r, here, keys);
      if (group.begin >= t + kColumns || group.end <= t) continue;
      grouped_product<Update::kStore>(here, head_dim, x.q + r * head_dim, x.k + t * head_dim,
                                      x.s + r * kBlockKeys + t, kBlockKeys);
    }
  }
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t here = rows - r < kRows ? rows - r : kRows;
    const Range group = group_range(x.range + r, here, keys);
    if (group.begin >= group.end) continue;
    for (int64_t i = r; i < r + here; ++i) {
      const Range row = block_range(x.range[i], keys);
      softmax_row(x.s + i * kBlockKeys, row.begin, row.end, group, factor, cap, x.m[i], x.l[i],
                  x.alpha[i]);
    }
  }
  for (int64_t c = 0; c < padded; c += kColumns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t here = rows - r < kRows ? rows - r : kRows;
      const Range group = group_range(x.range + r, here, keys);
      if (group.begin >= group.end) continue;
      strided_product<Update::kScaleAdd, kBlockKeys, 1>(
          here, group.end - group.begin, x.s + r * kBlockKeys + group.begin,
          x.v + c * kBlockKeys + group.begin * kColumns, x.o + r * padded + c, padded, x.alpha + r);
    }
  }
}

template <typename T>
inline void forward_task(const AttentionParams& p, const AttentionPlan& plan, int64_t task,
                         void* workspace, void* memory) {
  using Real = RealOf<T>;
  const ForwardScratch<Real> x(memory, p.head_dim, nullptr);
  const Task t = locate(p, plan, task);
  const int64_t padded = padded_columns<Real>(p.head_dim);
  const int64_t rows = round_up(t.rows.end - t.rows.begin, Tile<Real>::kStep);
  const Range seen = row_ranges(p, t, rows, x.range);
  const Real lowest = -__builtin_inf();

  // Scores are compared before scaling: a negative scale goes into the queries.
  const Real sign = p.scale < 0 ? -1 : 1;
  pack_queries<T>(p, t, p.q, p.rotate_q, rows, sign, x.range, x.q, x.rows);
  for (int64_t i = 0; i < rows * padded; ++i) x.o[i] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    x.m[i] = lowest;
    x.l[i] = 0;
  }
  const Softcap<Real> cap(p.scale * sign, p.softcap);
  const Real factor = (cap.on ? 1 : p.scale * sign) * 1.4426950408889634;  // log2(e)

  const Tokens<T> k(p.k, p.rotate_k, p.head_dim, t.batch, t.kv_head);
  const Tokens<T> v(p.v, AttentionRotation{}, p.head_dim, t.batch, t.kv_head);
  for (int64_t first = seen.begin; first < seen.end; first += kBlockKeys) {
    const int64_t count = seen.end - first < kBlockKeys ? seen.end - first : kBlockKeys;
    pack_transposed(k, first, count, x.k, x.rows);
    for (int64_t j = 0; j < count; ++j) {
      v.read(first + j, x.rows);
      pack_row(x.rows, p.head_dim, j, kBlockKeys, x.v);
    }
    forward_block(x, rows, Range{first, first + count}, p.head_dim, factor, cap);
  }

  for (int64_t i = 0; i < t.rows.end - t.rows.begin; ++i) {
    Real* const o = x.o + i * padded;
    const Real inverse = x.l[i] == 0 ? 0 : 1 / x.l[i];
    for (int64_t d = 0; d < p.head_dim; ++d) o[d] *= inverse;
    const Real lse = x.l[i] == 0 ? lowest : x.m[i] * Real(0.6931471805599453) + natural_log(x.l[i]);
    const RowIndex row(p, t, i);
    if (plan.splits > 1) {
      const int64_t index = t.split * p.batch * p.heads * p.queries + row.flat;
      Real* const parts = static_cast<Real*>(workspace);
      __builtin_memcpy(parts + index * p.head_dim, o, p.head_dim * sizeof(Real));
      parts[plan.splits * p.batch * p.heads * p.queries * p.head_dim + index] = lse;
    } else {
      write_row(o, row.in<T>(p.out), p.head_dim);
      static_cast<Real*>(p.lse)[row.flat] = lse;
    }
  }
}

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
    static_cast<Real*>(p.lse)[r] = sum == 0 ? most : shift + natural_log(sum);
    const int64_t query = r % p.queries, head = r / p.queries % p.heads;
    T* const y = static_cast<T*>(p.out.data) + r / p.queries / p.heads * p.out.batch_stride +
                 head * p.out.head_stride + query * p.out.token_stride;
    write_row(row, y, p.head_dim);
  }
}
