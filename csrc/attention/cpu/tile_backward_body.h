// The backward pass on the products of product_body.h, operands in Real (no include guard: part of
// a body).

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

template <typename T>
struct TileGradProducts {
  using Real = RealOf<T>;
  static constexpr int64_t kStep = Tile<Real>::kStep;

  int64_t head_dim, padded;
  Real *q_groups, *do_groups;  // [kGradRows, head_dim] in groups of a tile's rows
  Real *q_panels, *do_panels;  // [kGradRows, head_dim] in panels
  Real *k, *v;                 // [kBlockKeys, head_dim] transposed, in panels
  Real* k_panels;              // [kBlockKeys, head_dim] in panels
  Real *s, *ds;                // [kGradRows, kBlockKeys]
  Real *dk, *dv;               // [kBlockKeys, padded]
  Real* row;                   // a tile's rows or columns times head_dim
  Range* range;                // [kGradRows] visible keys

  TileGradProducts(const AttentionParams& p, void* memory, size_t* bytes)
      : head_dim(p.head_dim), padded(padded_columns<Real>(p.head_dim)) {
    Carver carve(memory);
    for (Real** x : {&q_groups, &do_groups}) *x = carve.take<Real>(kGradRows * head_dim);
    for (Real** x : {&q_panels, &do_panels}) *x = carve.take<Real>(kGradRows * padded);
    for (Real** x : {&k, &v}) *x = carve.take<Real>(kBlockKeys * head_dim);
    k_panels = carve.take<Real>(kBlockKeys * padded);
    for (Real** x : {&s, &ds}) *x = carve.take<Real>(kGradRows * kBlockKeys);
    for (Real** x : {&dk, &dv}) *x = carve.take<Real>(kBlockKeys * padded);
    row = carve.take<Real>((Tile<Real>::kColumns + Tile<Real>::kRows) * padded);
    range = carve.take<Range>(kGradRows);
    if (bytes) *bytes = carve.bytes();
  }

  void pack_keys(const Tokens<T>& keys, const Tokens<T>& values, int64_t first,
                 int64_t count) const {
    pack_transposed(keys, first, count, k, row);
    pack_transposed(values, first, count, v, row);
    for (int64_t j = 0; j < count; ++j) {
      keys.read(first + j, row);
      pack_row(row, head_dim, j, kBlockKeys, k_panels);
    }
    for (int64_t i = 0; i < kBlockKeys * padded; ++i) dk[i] = dv[i] = 0;
  }

  void pack_rows(const AttentionBackwardParams& g, const Task& t, int64_t rows) const {
    const AttentionParams& p = g.forward;
    const AttentionTable none{};
    pack_queries<T>(p, t, p.q, none, rows, 1, range, q_groups, row, q_panels, kGradRows);
    pack_queries<T>(p, t, g.grad_out, none, rows, 1, range, do_groups, row, do_panels, kGradRows);
  }

  // The five products for a block of rows and a block of keys. dq: [rows, padded].
  void add_block(int64_t rows, Range keys, const SoftmaxGrad<Real>& softmax, const Real* lse,
                 const Real* delta, Real* dq) const {
    constexpr int64_t kRows = Tile<Real>::kRows, kColumns = Tile<Real>::kColumns;
    const int64_t count = round_up(keys.end - keys.begin, kColumns);
    for (int64_t t = 0; t < count; t += kColumns) {
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t here = rows - r < kRows ? rows - r : kRows;
        const Range group = group_range(range + r, here, keys);
        if (group.begin >= t + kColumns || group.end <= t) continue;
        grouped_product<Update::kStore>(here, head_dim, q_groups + r * head_dim, k + t * head_dim,
                                        s + r * kBlockKeys + t, kBlockKeys);
        grouped_product<Update::kStore>(here, head_dim, do_groups + r * head_dim, v + t * head_dim,
                                        ds + r * kBlockKeys + t, kBlockKeys);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      softmax(s + r * kBlockKeys, ds + r * kBlockKeys, block_range(range[r], keys), Range{0, count},
              lse[r], delta[r]);
    }
    for (int64_t c = 0; c < padded; c += kColumns) {
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t here = rows - r < kRows ? rows - r : kRows;
        const Range group = group_range(range + r, here, keys);
        if (group.begin >= group.end) continue;
        strided_product<Update::kAdd, kBlockKeys, 1>(
            here, group.end - group.begin, ds + r * kBlockKeys + group.begin,
            k_panels + c * kBlockKeys + group.begin * kColumns, dq + r * padded + c, padded);
      }
    }
    for (int64_t t = 0; t < keys.end - keys.begin; t += kRows) {
      const int64_t left = round_up(keys.end - keys.begin - t, Tile<Real>::kStep);
      const int64_t here = left < kRows ? left : kRows;
      const Range seeing = rows_that_see(range, rows, keys, t, t + here);
      if (seeing.begin >= seeing.end) continue;
      const int64_t depth = seeing.end - seeing.begin, a = seeing.begin * kBlockKeys + t;
      for (int64_t c = 0; c < padded; c += kColumns) {
        const int64_t b = c * kGradRows + seeing.begin * kColumns;
        strided_product<Update::kAdd, 1, kBlockKeys>(here, depth, s + a, do_panels + b,
                                                     dv + t * padded + c, padded);
        strided_product<Update::kAdd, 1, kBlockKeys>(here, depth, ds + a, q_panels + b,
                                                     dk + t * padded + c, padded);
      }
    }
  }

  void finish_keys() const {}
};
