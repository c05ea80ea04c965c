// What the passes share: blocks and the visible keys of a row (no include guard: part of a body).

// A multiple of every instruction set's rows of a tile (12, 6, 4) and of its columns (up to 32).
// Larger blocks pack keys less often; these keep a task within a second-level cache of 1 MiB.
constexpr int64_t kBlockRows = 384;  // at most
constexpr int64_t kBlockKeys = 256;

template <typename Real>
inline int64_t padded_columns(int64_t columns) {
  return round_up(columns, Tile<Real>::kColumns);
}

// score = softcap tanh(scale s / softcap).
template <typename Real>
struct Softcap {
  bool on;
  Real inner, outer;

  Softcap(double scale, double softcap)
      : on(softcap > 0), inner(on ? scale / softcap : 0), outer(softcap) {}
  VectorOf<Real> operator()(VectorOf<Real> s) const { return tanh(s * inner) * outer; }
};

// A block of rows of one key/value head. Row r is query r / group of the head r % group in the
// group of heads that share the keys, so that neighbours see about the same keys.
struct Task {
  int64_t batch, kv_head, group, split;
  Range rows;
  Range keys;  // of the split
};

inline Task locate(const AttentionParams& p, const AttentionPlan& plan, int64_t task) {
  Task t;
  t.group = p.heads / p.kv_heads;
  t.split = task % plan.splits;
  task /= plan.splits;
  // The last block sees most keys: longest first.
  const int64_t block = plan.row_blocks - 1 - task % plan.row_blocks;
  task /= plan.row_blocks;
  t.kv_head = task % p.kv_heads;
  t.batch = task / p.kv_heads;
  const int64_t end = (block + 1) * plan.block_rows, rows = p.queries * t.group;
  t.rows = Range{block * plan.block_rows, end < rows ? end : rows};
  t.keys = Range{t.split * plan.split_keys, (t.split + 1) * plan.split_keys};
  return t;
}

// All rows of one key/value head and a part of the keys.
inline Task locate_keys(const AttentionParams& p, const AttentionPlan& plan, int64_t task) {
  Task t;
  t.group = p.heads / p.kv_heads;
  t.split = task % plan.splits;
  t.kv_head = task / plan.splits % p.kv_heads;
  t.batch = task / plan.splits / p.kv_heads;
  t.rows = Range{0, p.queries * t.group};
  const int64_t end = (t.split + 1) * plan.split_keys;
  t.keys = Range{t.split * plan.split_keys, end < p.keys ? end : p.keys};
  return t;
}

struct RowIndex {
  int64_t batch, head, query, flat;

  RowIndex(const AttentionParams& p, const Task& t, int64_t row)
      : batch(t.batch),
        head(t.kv_head * t.group + (t.rows.begin + row) % t.group),
        query((t.rows.begin + row) / t.group),
        flat((batch * p.heads + head) * p.queries + query) {}

  template <typename T>
  T* in(const AttentionTensor& x) const {
    return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
           query * x.token_stride;
  }
};

// The queries of tier `tier` of the row of the batch, of all of them where there are no tiers.
inline Range queries_of(const AttentionParams& p, int64_t b, int64_t tier) {
  if (!p.tiers) return Range{0, p.queries};
  const int64_t* const begin = p.tiers->query_begin + b * (p.tiers->count + 1) + tier;
  return Range{begin[0], begin[1]};
}

// How the queries of the row of the batch turn, and the keys under a tier.
inline AttentionTable query_table(const AttentionParams& p, int64_t b) {
  return p.tiers ? p.tiers->queries[b] : AttentionTable{};
}
inline AttentionTable key_table(const AttentionParams& p, int64_t b, int64_t tier) {
  return p.tiers ? p.tiers->keys[b * p.tiers->count + tier] : AttentionTable{};
}

// The visible keys of every row of the task within its split, and the union of them; rows of other
// queries and beyond the last see none.
inline Range row_ranges(const AttentionParams& p, const Task& t, Range queries, int64_t rows,
                        Range* ranges) {
  Range all{p.keys, 0};
  for (int64_t i = 0; i < rows; ++i) {
    Range row{0, 0};
    const int64_t query = (t.rows.begin + i) / t.group;
    if (t.rows.begin + i < t.rows.end && query >= queries.begin && query < queries.end) {
      row = common_part(visible(p, t.batch, query), t.keys);
    }
    if (row.end > row.begin) {
      if (row.begin < all.begin) all.begin = row.begin;
      if (row.end > all.end) all.end = row.end;
    } else {
      row = Range{0, 0};
    }
    ranges[i] = row;
  }
  return all;
}

// The part of a row's keys in a block, counted from the block's first key.
inline Range block_range(Range row, Range block) {
  const int64_t begin = row.begin > block.begin ? row.begin : block.begin;
  const int64_t end = row.end < block.end ? row.end : block.end;
  return begin < end ? Range{begin - block.begin, end - block.begin} : Range{0, 0};
}

// The same for all rows of a tile together.
inline Range group_range(const Range* rows, int64_t count, Range block) {
  Range group{block.end - block.begin, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Range row = block_range(rows[i], block);
    if (row.begin >= row.end) continue;
    if (row.begin < group.begin) group.begin = row.begin;
    if (row.end > group.end) group.end = row.end;
  }
  return group;
}

// Rows of q (or of a tensor of its shape) in groups of a tile's rows, times `factor`; where
// `panels` is given, also in panels of `panel_rows` rows. Rows that see no key are zero. tile:
// [tile's rows, head_dim].
template <typename T>
inline void pack_queries(const AttentionParams& p, const Task& t, const AttentionTensor& x,
                         const AttentionTable& table, int64_t rows, RealOf<T> factor,
                         const Range* ranges, RealOf<T>* groups, RealOf<T>* tile,
                         RealOf<T>* panels = nullptr, int64_t panel_rows = 0) {
  constexpr int64_t kRows = Tile<RealOf<T>>::kRows;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t here = rows - r < kRows ? rows - r : kRows;
    for (int64_t i = 0; i < here; ++i) {
      RealOf<T>* const row = tile + i * p.head_dim;
      if (ranges[r + i].begin < ranges[r + i].end) {
        const RowIndex index(p, t, r + i);
        Tokens<T>(x, table, p.head_dim, index.batch, index.head).read(index.query, row);
        for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= factor;
      } else {
        for (int64_t d = 0; d < p.head_dim; ++d) row[d] = 0;
      }
      if (panels) pack_row(row, p.head_dim, r + i, panel_rows, panels);
    }
    pack_groups(tile, here, p.head_dim, groups + r * p.head_dim);
  }
}
