// The backward pass (no include guard: part of a body). One task: some keys of one key/value head
// against all rows that see them. For a block of keys, kept with its gradients, and every block of
// rows:
//
//   S = Q K^T;  P = exp(score(S) - lse);  dP = dO V^T;  dS = P (dP - delta)
//   dV += P^T dO;  dK += dS^T Q;  dQ += dS K
//
// dQ gathers in the workspace, one sum for every split of the keys, added up in order afterwards:
// no atomics, so the result is the same on every run. Gradients are multiplied by scale when
// written. The operands' types and the products are those of Products: tile_backward_body.h,
// library_backward_body.h.

// Rows in work at a time: several operands and two matrices share the cache.
constexpr int64_t kGradRows = 96;

template <typename Real>
inline int64_t padded_grad_columns(const AttentionParams& p, const AttentionPlan& plan) {
  return plan.bfloat16_products ? library_padded(p.head_dim) : padded_columns<Real>(p.head_dim);
}

// The part of the workspace that belongs to one task.
template <typename Real>
struct GradWorkspace {
  Real* dq;     // [rows, padded head_dim]
  Real* delta;  // [rows]
  Real* lse;    // [rows] in powers of two

  static int64_t elements(const AttentionParams& p, const AttentionPlan& plan) {
    return round_up(rows(p) * (padded_grad_columns<Real>(p, plan) + 2), 64);
  }
  static int64_t rows(const AttentionParams& p) {
    return round_up(p.queries * (p.heads / p.kv_heads), kGradRows);
  }
  GradWorkspace(const AttentionParams& p, const AttentionPlan& plan, void* workspace, int64_t task)
      : dq(static_cast<Real*>(workspace) + task * elements(p, plan)),
        delta(dq + rows(p) * padded_grad_columns<Real>(p, plan)),
        lse(delta + rows(p)) {}
};

// How scores s and dP become P and dS.
template <typename Real>
struct SoftmaxGrad {
  Softcap<Real> cap;
  Real factor;  // takes scores to powers of two

  explicit SoftmaxGrad(const AttentionParams& p)
      : cap(p.scale, p.softcap), factor((cap.on ? 1 : p.scale) * kLog2E) {}

  // One row, visible in `row`: zero in the rest of `written`.
  void operator()(Real* s, Real* ds, Range row, Range written, Real lse, Real delta) const {
    using V = VectorOf<Real>;
    constexpr int64_t kLanes = Vector<Real>::kLanes;
    if (row.begin >= row.end || lse == -__builtin_inf()) row = Range{written.begin, written.begin};
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
      for (int64_t j = written.begin; j < row.begin; ++j) x[j] = 0;
      for (int64_t j = row.end; j < written.end; ++j) x[j] = 0;
    }
  }
};

// delta and lse of all rows of the task; dQ starts at zero.
template <typename T>
inline void prepare_rows(const AttentionBackwardParams& g, const Task& t,
                         const GradWorkspace<RealOf<T>>& w, int64_t padded, RealOf<T>* rows) {
  using Real = RealOf<T>;
  const AttentionParams& p = g.forward;
  const int64_t all = GradWorkspace<Real>::rows(p);
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
    w.lse[i] = static_cast<const Real*>(p.lse)[row.flat] * static_cast<Real>(kLog2E);
  }
}

template <typename T>
inline void write_gradient(const RealOf<T>* x, RealOf<T> factor, const AttentionTensor& y,
                           const Task& t, int64_t key, int64_t head_dim, RealOf<T>* row) {
  for (int64_t d = 0; d < head_dim; ++d) row[d] = x ? x[d] * factor : 0;
  store_row(row,
            static_cast<T*>(y.data) + t.batch * y.batch_stride + t.kv_head * y.head_stride +
                key * y.token_stride,
            head_dim);
}

template <typename T, template <typename> class Products>
inline void backward_task(const AttentionBackwardParams& g, const AttentionPlan& plan, int64_t task,
                          void* workspace, void* memory) {
  using Real = RealOf<T>;
  const AttentionParams& p = g.forward;
  const Products<T> x(p, memory, nullptr);
  const GradWorkspace<Real> w(p, plan, workspace, task);
  Task t = locate_keys(p, plan, task);
  prepare_rows<T>(g, t, w, x.padded, x.row);

  const SoftmaxGrad<Real> softmax(p);
  const Tokens<T> k(p.k, AttentionTable{}, p.head_dim, t.batch, t.kv_head);
  const Tokens<T> v(p.v, AttentionTable{}, p.head_dim, t.batch, t.kv_head);
  const Range all_rows = t.rows, all_keys = t.keys;
  for (int64_t first = all_keys.begin; first < all_keys.end; first += kBlockKeys) {
    const int64_t end = first + kBlockKeys < all_keys.end ? first + kBlockKeys : all_keys.end;
    t.keys = Range{first, end};
    Range packed{0, 0};
    for (int64_t r = 0; r < all_rows.end; r += kGradRows) {
      t.rows = Range{r, r + kGradRows < all_rows.end ? r + kGradRows : all_rows.end};
      const int64_t rows = round_up(t.rows.end - t.rows.begin, Products<T>::kStep);
      const Range seen = row_ranges(p, t, Range{0, p.queries}, rows, x.range);
      if (seen.begin >= seen.end) continue;
      if (packed.end == 0) {
        // The first rows that see the block: pack what any row of the call sees of it.
        packed = common_part(visible_to_any(p, t.batch, attending(p, t.batch)), t.keys);
        x.pack_keys(k, v, packed.begin, packed.end - packed.begin);
      }
      x.pack_rows(g, t, rows);
      x.add_block(rows, packed, softmax, w.lse + r, w.delta + r, w.dq + r * x.padded);
    }
    if (packed.end > 0) x.finish_keys();
    for (int64_t j = first; j < end; ++j) {
      const int64_t at = (j - packed.begin) * x.padded;
      const bool seen = packed.begin <= j && j < packed.end;
      write_gradient<T>(seen ? x.dk + at : nullptr, p.scale, g.grad_k, t, j, p.head_dim, x.row);
      write_gradient<T>(seen ? x.dv + at : nullptr, 1, g.grad_v, t, j, p.head_dim, x.row);
    }
  }
}

// dQ of rows [begin, end) of the batch * kv_heads * (queries * group): the sum over the splits.
template <typename T>
inline void finish_queries(const AttentionBackwardParams& g, const AttentionPlan& plan,
                           const void* workspace, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const AttentionParams& p = g.forward;
  const int64_t padded = padded_grad_columns<Real>(p, plan);
  const int64_t rows = p.queries * (p.heads / p.kv_heads);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t whole = r / rows;  // row of the batch and key/value head
    Real row[kMaxHeadDim] = {};
    for (int64_t s = 0; s < plan.splits; ++s) {
      const GradWorkspace<Real> w(p, plan, const_cast<void*>(workspace), whole * plan.splits + s);
      const Real* const dq = w.dq + r % rows * padded;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] += dq[d];
    }
    for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= static_cast<Real>(p.scale);
    const RowIndex index(p, locate_keys(p, plan, whole * plan.splits), r % rows);
    store_row(row, index.in<T>(g.grad_q), p.head_dim);
  }
}
