// The forward pass (no include guard: part of a body). One task: a block of rows, the queries of
// all heads that share a key/value head, against the visible keys, a block of keys at a time:
//
//   S = Q K^T;  m' = max(m, max S);  P = exp(S - m');  l = l exp(m - m') + sum P
//   O = O exp(m - m') + P V
//
// Keys and values are packed once for all rows of the task, which then go by in groups, so that the
// scores of a group are used while they are in the cache. What lies outside the visible range is
// skipped: causal attention does half the work and a window only what it spans. Where the queries
// of a block are of several tiers, it goes through the keys once for each, which turns them. The
// operands' types and the products are those of Products: tile_forward_body.h,
// library_forward_body.h.

// Rows whose scores are in work at a time: a multiple of every tile's rows. 96 * kBlockKeys scores
// are 96 KiB of a second-level cache.
constexpr int64_t kGroupRows = 96;

template <typename Real>
struct RowState {
  Real* o;       // [rows, padded head_dim], not yet divided by l
  Real* m;       // [rows] largest score so far, in powers of two
  Real* l;       // [rows] sum of 2^(score - m)
  Real* alpha;   // [rows] 2^(m before - m)
  Range* range;  // [rows] visible keys

  void carve(Carver& carver, int64_t rows, int64_t padded) {
    o = carver.take<Real>(rows * padded);
    for (Real** x : {&m, &l, &alpha}) *x = carver.take<Real>(rows);
    range = carver.take<Range>(rows);
  }

  void clear(int64_t rows, int64_t padded) const {
    for (int64_t i = 0; i < rows * padded; ++i) o[i] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      m[i] = -__builtin_inf();
      l[i] = 0;
    }
  }
};

// How scores become probabilities.
template <typename Real>
struct Softmax {
  // Scores are compared before scaling, so that what is negative or zero in the scale goes into the
  // queries (and -inf, the score of what is not visible, is never multiplied by zero).
  Real sign;
  Softcap<Real> cap;
  Real factor;  // takes scores to powers of two

  explicit Softmax(const AttentionParams& p)
      : sign((static_cast<Real>(p.scale) > 0) - (static_cast<Real>(p.scale) < 0)),
        cap(sign == 0 ? 1 : p.scale * sign, p.softcap),
        factor((cap.on || sign == 0 ? 1 : p.scale * sign) * kLog2E) {}

  // One row of scores, visible in `row`, to probabilities there and zeros in the rest of `written`.
  // The probabilities may take the place of the scores.
  template <typename Probability>
  void operator()(Real* s, Range row, Range written, Real& m, Real& l, Real& alpha,
                  Probability* p) const {
    using V = VectorOf<Real>;
    constexpr int64_t kLanes = Vector<Real>::kLanes;
    alpha = 1;
    if (row.begin >= row.end) {
      for (int64_t j = written.begin; j < written.end; j += kLanes) store_vector(p + j, V{});
      return;
    }
    const int64_t first = row.begin / kLanes * kLanes, last = round_up(row.end, kLanes);
    if (cap.on) {
      for (int64_t j = first; j < last; j += kLanes) store_vector(s + j, cap(load_vector(s + j)));
    }
    const int64_t zeros = written.begin / kLanes * kLanes;
    const Real lowest = -__builtin_inf();
    for (int64_t j = first; j < row.begin; ++j) s[j] = lowest;
    for (int64_t j = row.end; j < last; ++j) s[j] = lowest;
    V most = load_vector(s + first);
    for (int64_t j = first + kLanes; j < last; j += kLanes) {
      most = greater<Real>(most, load_vector(s + j));
    }
    const Real here = horizontal_max<Real>(most) * factor;
    const Real m_new = here > m ? here : m;
    // All scores -inf so far: any finite number in the place of m gives probabilities of 0.
    const Real shift = m_new == lowest ? Real{0} : m_new;
    for (int64_t j = zeros; j < first; j += kLanes) store_vector(p + j, V{});
    V sum{};
    for (int64_t j = first; j < last; j += kLanes) {
      const V x = exp2(load_vector(s + j) * factor - shift);
      store_vector(p + j, x);
      sum += x;
    }
    for (int64_t j = last; j < written.end; j += kLanes) store_vector(p + j, V{});
    if (m_new != m) alpha = exp2(broadcast<Real>(m - shift))[0];
    l = l * alpha + horizontal_sum<Real>(sum);
    m = m_new;
  }
};

template <typename T, template <typename> class Products>
inline void forward_task(const AttentionParams& p, const AttentionPlan& plan, int64_t task,
                         void* workspace, void* memory) {
  using Real = RealOf<T>;
  Products<T> x(p, plan, memory, nullptr);
  const Task t = locate(p, plan, task);
  const int64_t rows = round_up(t.rows.end - t.rows.begin, Products<T>::kStep);
  Range* const ranges = x.state.range;
  const Range all_seen = row_ranges(p, t, Range{0, p.queries}, rows, ranges);
  const Softmax<Real> softmax(p);
  x.pack_queries(p, t, rows, softmax.sign);
  x.state.clear(rows, x.padded);
  const Tokens<T> v(p.v, AttentionTable{}, p.head_dim, t.batch, t.kv_head);
  for (int64_t tier = 0; tier < (p.tiers ? p.tiers->count : 1); ++tier) {
    const Range queries = queries_of(p, t.batch, tier);
    const Range own =
        common_part(Range{queries.begin * t.group, queries.end * t.group}, t.rows);  // rows
    if (own.begin >= own.end) continue;
    const bool whole = own.begin == t.rows.begin && own.end == t.rows.end;
    const Range seen = whole ? all_seen : row_ranges(p, t, queries, rows, ranges);
    const Tokens<T> k(p.k, key_table(p, t.batch, tier), p.head_dim, t.batch, t.kv_head);
    for (int64_t first = seen.begin, count; first < seen.end; first += count) {
      const int64_t most = Products<T>::block_keys(k.table, first);
      count = seen.end - first < most ? seen.end - first : most;
      x.pack_keys(k, v, first, count);
      for (int64_t r = 0; r < rows; r += kGroupRows) {
        const int64_t here = rows - r < kGroupRows ? rows - r : kGroupRows;
        x.add_block(r, here, Range{first, first + count}, softmax);
      }
    }
  }

  for (int64_t i = 0; i < t.rows.end - t.rows.begin; ++i) {
    Real* const o = x.output(i);
    const Real l = x.state.l[i], inverse = l == 0 ? 0 : 1 / l;
    for (int64_t d = 0; d < p.head_dim; ++d) o[d] *= inverse;
    // Of a score of +inf the sum is NaN, and so is the output; lse is +inf.
    const Real m = x.state.m[i];
    const Real rest = m == __builtin_inf() ? Real{0} : natural_log(l);
    const Real lse = l == 0 ? -__builtin_inf() : m * static_cast<Real>(kLn2) + rest;
    const RowIndex row(p, t, i);
    if (plan.splits > 1) {
      const int64_t index = t.split * p.batch * p.heads * p.queries + row.flat;
      Real* const parts = static_cast<Real*>(workspace);
      __builtin_memcpy(parts + index * p.head_dim, o, p.head_dim * sizeof(Real));
      parts[plan.splits * p.batch * p.heads * p.queries * p.head_dim + index] = lse;
    } else {
      store_row(o, row.in<T>(p.out), p.head_dim);
      static_cast<Real*>(p.lse)[row.flat] = lse;
    }
  }
}
