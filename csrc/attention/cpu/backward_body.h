// The backward pass (no include guard: part of a body). One task: some keys of one key/value head
// against all rows that see them. For a block of keys, kept with its gradients, and every block of
// rows:
//
//   S = Q K^T;  P = exp(score(S) - lse);  dP = dO V^T;  dS = P (dP - delta)
//   dV += P^T dO;  dK += dS^T Q;  dQ += dS K
//
// dQ gathers in the workspace, one sum for every split of the keys, added up in order afterwards:
// no atomics, so the result is the same on every run. Gradients are multiplied by scale when
// written.

// Half the rows of the forward pass: here six operands and two matrices share the cache.
constexpr int64_t kGradRows = 96;

template <typename Real>
struct BackwardScratch {
  Real *q_groups, *do_groups;  // [kGradRows, head_dim] in groups of a tile's rows
  Real *q_panels, *do_panels;  // [kGradRows, head_dim] in panels
  Real *k, *v;                 // [kBlockKeys, head_dim] transposed, in panels
  Real* k_panels;              // [kBlockKeys, head_dim] in panels
  Real *s, *ds;                // [kGradRows, kBlockKeys]
  Real *dk, *dv;               // [kBlockKeys, padded head_dim]
  Real* rows;                  // a tile's rows or columns times head_dim
  Range* range;                // [kGradRows] visible keys

  BackwardScratch(void* memory, int64_t head_dim, size_t* bytes) {
    Carver carve(memory);
    const int64_t padded = padded_columns<Real>(head_dim);
    for (Real** x : {&q_groups, &do_groups}) *x = carve.take<Real>(kGradRows * head_dim);
    for (Real** x : {&q_panels, &do_panels}) *x = carve.take<Real>(kGradRows * padded);
    for (Real** x : {&k, &v}) *x = carve.take<Real>(kBlockKeys * head_dim);
    k_panels = carve.take<Real>(kBlockKeys * padded);
    for (Real** x : {&s, &ds}) *x = carve.take<Real>(kGradRows * kBlockKeys);
    for (Real** x : {&dk, &dv}) *x = carve.take<Real>(kBlockKeys * padded);
    rows = carve.take<Real>((Tile<Real>::kColumns + Tile<Real>::kRows) * padded);
    range = carve.take<Range>(kGradRows);
    if (bytes) *bytes = carve.bytes();
  }
};

// The part of the workspace that belongs to one task.
template <typename Real>
struct GradWorkspace {
  Real* dq;     // [rows, padded head_dim]
  Real* delta;  // [rows]
  Real* lse;    // [rows] in powers of two

  static int64_t elements(const AttentionParams& p) {
    return round_up(rows(p) * (padded_columns<Real>(p.head_dim) + 2), 64);
  }
  static int64_t rows(const AttentionParams& p) {
    return round_up(p.queries * (p.heads / p.kv_heads), kGradRows);
  }
  GradWorkspace(const AttentionParams& p, void* workspace, int64_t task)
      : dq(static_cast<Real*>(workspace) + task * elements(p)),
        delta(dq + rows(p) * padded_columns<Real>(p.head_dim)),
        lse(delta + rows(p)) {}
};

// One row: scores s and dP to P and dS, zero outside [begin, end) up to `count`.
template <typename Real>
inline void softmax_grad_row(Real* s, Real* ds, Range row, int64_t count, Real factor,
                             const Softcap<Real>& cap, Real lse, Real delta) {
  using V = VectorOf<Real>;
  constexpr int64_t kLanes = Vector<Real>::kLanes;
  if (row.begin >= row.end || lse == -__builtin_inf()) row = Range{0, 0};
  const int64_t first = row.begin / kLanes * kLanes, last = round_up(row.end, kLanes);
  for (int64_t j = first; j < last; j += kLanes) {
    V score = load_vector(s + j);
    V slope = broadcast<Real>(1);
    if (cap.on) {
      const V t = tanh(score * cap.inner);
      slope = slope - t * t;
      score = t * cap.outer;
    }
    const V p = exp2(score * factor - lse);
    store_vector(s + j, p);
    store_vector(ds + j, p * (load_vector(ds + j) - delta) * slope);
  }
  for (Real* x : {s, ds}) {
    for (int64_t j = 0; j < row.begin; ++j) x[j] = 0;
    for (int64_t j = row.end; j < count; ++j) x[j] = 0;
  }
}

// The rows that see any of the keys [begin, end) of the block.
inline Range rows_that_see(const Range* ranges, int64_t rows, Range block, int64_t begin,
                           int64_t end) {
  Range seeing{rows, 0};
  for (int64_t r = 0; r < rows; ++r) {
    const Range row = block_range(ranges[r], block);
    if (row.begin >= row.end || row.begin >= end || row.end <= begin) continue;
    if (r < seeing.begin) seeing.begin = r;
    seeing.end = r + 1;
  }
  return seeing;
}

// The five products for a block of rows and a block of keys. dq: [rows, padded head_dim].
template <typename Real>
inline void backward_block(const BackwardScratch<Real>& x, int64_t rows, Range keys,
                           int64_t head_dim, Real factor, const Softcap<Real>& cap, const Real* lse,
                           const Real* delta, Real* dq) {
  constexpr int64_t kRows = Tile<Real>::kRows, kColumns = Tile<Real>::kColumns;
  const int64_t padded = padded_columns<Real>(head_dim);
  const int64_t count = round_up(keys.end - keys.begin, kColumns);
  for (int64_t t = 0; t < count; t += kColumns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t here = rows - r < kRows ? rows - r : kRows;
      const Range group = group_range(x.range + r, here, keys);
      if (group.begin >= t + kColumns || group.end <= t) continue;
      grouped_product<Update::kStore>(here, head_dim, x.q_groups + r * head_dim, x.k + t * head_dim,
                                      x.s + r * kBlockKeys + t, kBlockKeys);
      grouped_product<Update::kStore>(here, head_dim, x.do_groups + r * head_dim,
                                      x.v + t * head_dim, x.ds + r * kBlockKeys + t, kBlockKeys);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    softmax_grad_row(x.s + r * kBlockKeys, x.ds + r * kBlockKeys, block_range(x.range[r], keys),
                     count, factor, cap, lse[r], delta[r]);
  }
  for (int64_t c = 0; c < padded; c += kColumns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t here = rows - r < kRows ? rows - r : kRows;
      const Range group = group_range(x.range + r, here, keys);
      if (group.begin >= group.end) continue;
      strided_product<Update::kAdd, kBlockKeys, 1>(
          here, group.end - group.begin, x.ds + r * kBlockKeys + group.begin,
          x.k_panels + c * kBlockKeys + group.begin * kColumns, dq + r * padded + c, padded);
    }
  }
  for (int64_t t = 0; t < keys.end - keys.begin; t += kRows) {
    const int64_t left = round_up(keys.end - keys.begin - t, Tile<Real>::kStep);
    const int64_t here = left < kRows ? left : kRows;
    const Range seeing = rows_that_see(x.range, rows, keys, t, t + here);
    if (seeing.begin >= seeing.end) continue;
    const int64_t depth = seeing.end - seeing.begin, a = seeing.begin * kBlockKeys + t;
    for (int64_t c = 0; c < padded; c += kColumns) {
      const int64_t b = c * kGradRows + seeing.begin * kColumns;
      strided_product<Update::kAdd, 1, kBlockKeys>(here, depth, x.s + a, x.do_panels + b,
                                                   x.dv + t * padded + c, padded);
      strided_product<Update::kAdd, 1, kBlockKeys>(here, depth, x.ds + a, x.q_panels + b,
                                                   x.dk + t * padded + c, padded);
    }
  }
}

// delta and lse of all rows of the task; dQ starts at zero.
template <typename T>
inline void prepare_rows(const AttentionGradParams& g, const Task& t,
                         const GradWorkspace<RealOf<T>>& w, RealOf<T>* rows) {
  using Real = RealOf<T>;
  const AttentionParams& p = g.forward;
  const int64_t all = GradWorkspace<Real>::rows(p), padded = padded_columns<Real>(p.head_dim);
  for (int64_t i = 0; i < all * padded; ++i) w.dq[i] = 0;
  for (int64_t i = 0; i < all; ++i) {
    w.delta[i] = 0;
    w.lse[i] = 0;
    if (i >= t.rows.end) continue;
    const RowIndex row(p, t, i);
    Real* const out = rows;
    Real* const grad = rows + p.head_dim;
    load_row(row.in<const T>(p.out), out, p.head_dim);
    load_row(row.in<const T>(g.grad_out), grad, p.head_dim);
    Real sum = 0;
    for (int64_t d = 0; d < p.head_dim; ++d) sum += out[d] * grad[d];
    if (g.grad_lse) sum -= static_cast<const Real*>(g.grad_lse)[row.flat];
    w.delta[i] = sum;
    w.lse[i] = static_cast<const Real*>(p.lse)[row.flat] * Real(1.4426950408889634);  // log2(e)
  }
}

template <typename T>
inline void write_gradient(const RealOf<T>* x, RealOf<T> factor, const AttentionTensor& y,
                           const Task& t, int64_t key, int64_t head_dim, RealOf<T>* row) {
  for (int64_t d = 0; d < head_dim; ++d) row[d] = x ? x[d] * factor : 0;
  write_row(row,
            static_cast<T*>(y.data) + t.batch * y.batch_stride + t.kv_head * y.head_stride +
                key * y.token_stride,
            head_dim);
}

template <typename T>
inline void backward_task(const AttentionGradParams& g, const AttentionPlan& plan, int64_t task,
                          void* workspace, void* memory) {
  using Real = RealOf<T>;
  const AttentionParams& p = g.forward;
  const BackwardScratch<Real> x(memory, p.head_dim, nullptr);
  const GradWorkspace<Real> w(p, workspace, task);
  const int64_t padded = padded_columns<Real>(p.head_dim);
  Task t = locate_keys(p, plan, task);
  prepare_rows<T>(g, t, w, x.rows);

  const Softcap<Real> cap(p.scale, p.softcap);
  const Real factor = (cap.on ? 1 : p.scale) * 1.4426950408889634;  // log2(e)
  const Tokens<T> k(p.k, AttentionRotation{}, p.head_dim, t.batch, t.kv_head);
  const Tokens<T> v(p.v, AttentionRotation{}, p.head_dim, t.batch, t.kv_head);
  const Range all_rows = t.rows, all_keys = t.keys;
  for (int64_t first = all_keys.begin; first < all_keys.end; first += kBlockKeys) {
    const int64_t end = first + kBlockKeys < all_keys.end ? first + kBlockKeys : all_keys.end;
    t.keys = Range{first, end};
    Range packed{0, 0};
    for (int64_t r = 0; r < all_rows.end; r += kGradRows) {
      t.rows = Range{r, r + kGradRows < all_rows.end ? r + kGradRows : all_rows.end};
      const int64_t rows = round_up(t.rows.end - t.rows.begin, Tile<Real>::kStep);
      const Range seen = row_ranges(p, t, rows, x.range);
      if (seen.begin >= seen.end) continue;
      if (packed.end == 0) {
        // The first rows that see the block: pack what any row of the call sees of it.
        packed = seen_by_all(p, t);
        const int64_t count = packed.end - packed.begin;
        pack_transposed(k, packed.begin, count, x.k, x.rows);
        pack_transposed(v, packed.begin, count, x.v, x.rows);
        for (int64_t j = 0; j < count; ++j) {
          k.read(packed.begin + j, x.rows);
          pack_row(x.rows, p.head_dim, j, kBlockKeys, x.k_panels);
        }
        for (int64_t i = 0; i < kBlockKeys * padded; ++i) x.dk[i] = x.dv[i] = 0;
      }
      pack_queries<T>(p, t, p.q, AttentionRotation{}, rows, 1, x.range, x.q_groups, x.rows,
                      x.q_panels, kGradRows);
      pack_queries<T>(p, t, g.grad_out, AttentionRotation{}, rows, 1, x.range, x.do_groups, x.rows,
                      x.do_panels, kGradRows);
      backward_block(x, rows, packed, p.head_dim, factor, cap, w.lse + r, w.delta + r,
                     w.dq + r * padded);
    }
    for (int64_t j = first; j < end; ++j) {
      const int64_t at = (j - packed.begin) * padded;
      const bool seen = packed.begin <= j && j < packed.end;
      write_gradient<T>(seen ? x.dk + at : nullptr, p.scale, g.grad_k, t, j, p.head_dim, x.rows);
      write_gradient<T>(seen ? x.dv + at : nullptr, 1, g.grad_v, t, j, p.head_dim, x.rows);
    }
  }
}

// dQ of rows [begin, end) of the batch * kv_heads * (queries * group): the sum over the splits.
template <typename T>
inline void finish_queries(const AttentionGradParams& g, const AttentionPlan& plan,
                           const void* workspace, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const AttentionParams& p = g.forward;
  const int64_t padded = padded_columns<Real>(p.head_dim);
  const int64_t rows = p.queries * (p.heads / p.kv_heads);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t whole = r / rows;  // row of the batch and key/value head
    Real row[kMaxHeadDim] = {};
    for (int64_t s = 0; s < plan.splits; ++s) {
      const GradWorkspace<Real> w(p, const_cast<void*>(workspace), whole * plan.splits + s);
      const Real* const dq = w.dq + r % rows * padded;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] += dq[d];
    }
    for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= static_cast<Real>(p.scale);
    const RowIndex index(p, locate_keys(p, plan, whole * plan.splits), r % rows);
    write_row(row, index.in<T>(g.grad_q), p.head_dim);
  }
}
