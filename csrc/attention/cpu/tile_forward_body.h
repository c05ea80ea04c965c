// The forward pass on the products of product_body.h, operands in Real (no include guard: part of a
// body).

template <typename T>
struct TileProducts {
  using Real = RealOf<T>;
  static constexpr int64_t kStep = Tile<Real>::kStep;

  int64_t head_dim, padded;
  Real* q;     // [rows, head_dim] in groups of a tile's rows
  Real* k;     // [kBlockKeys, head_dim] transposed, in panels
  Real* v;     // [kBlockKeys, head_dim] in panels
  Real* s;     // [kGroupRows, kBlockKeys]: scores, then probabilities
  Real* tile;  // a tile's rows or columns times head_dim
  RowState<Real> state;

  TileProducts(const AttentionParams& p, const AttentionPlan& plan, void* memory, size_t* bytes)
      : head_dim(p.head_dim), padded(padded_columns<Real>(p.head_dim)) {
    Carver carver(memory);
    q = carver.take<Real>(plan.block_rows * head_dim);
    k = carver.take<Real>(kBlockKeys * head_dim);
    v = carver.take<Real>(kBlockKeys * padded);
    s = carver.take<Real>(kGroupRows * kBlockKeys);
    tile = carver.take<Real>((Tile<Real>::kColumns + Tile<Real>::kRows) * padded);
    state.carve(carver, plan.block_rows, padded);
    if (bytes) *bytes = carver.bytes();
  }

  void pack_queries(const AttentionParams& p, const Task& t, int64_t rows, Real sign) const {
    attention::pack_queries<T>(p, t, p.q, query_table(p, t.batch), rows, sign, state.range, q,
                               tile);
  }

  void pack_keys(const Tokens<T>& keys, const Tokens<T>& values, int64_t first,
                 int64_t count) const {
    pack_transposed(keys, first, count, k, tile);
    for (int64_t j = 0; j < count; ++j) {
      values.read(first + j, tile);
      pack_row(tile, head_dim, j, kBlockKeys, v);
    }
  }

  static int64_t block_keys(const AttentionTable&, int64_t) { return kBlockKeys; }
  Real* output(int64_t r) const { return state.o + r * padded; }

  // Rows [r, r + rows), at most kGroupRows, against the packed keys.
  void add_block(int64_t r, int64_t rows, Range keys, const Softmax<Real>& softmax) const {
    constexpr int64_t kRows = Tile<Real>::kRows, kColumns = Tile<Real>::kColumns;
    Range seen[kGroupRows / kStep];  // by the rows of each tile
    for (int64_t i = 0; i < rows; i += kRows) {
      seen[i / kRows] = group_range(state.range + r + i, tile_rows(rows - i), keys);
    }
    for (int64_t t = 0; t < keys.end - keys.begin; t += kColumns) {
      for (int64_t i = 0; i < rows; i += kRows) {
        const Range here = seen[i / kRows];
        if (here.begin >= t + kColumns || here.end <= t) continue;
        grouped_product<Update::kStore>(tile_rows(rows - i), head_dim, q + (r + i) * head_dim,
                                        k + t * head_dim, s + i * kBlockKeys + t, kBlockKeys);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Range here = seen[i / kRows];
      if (here.begin >= here.end) continue;
      softmax(s + i * kBlockKeys, block_range(state.range[r + i], keys), here, state.m[r + i],
              state.l[r + i], state.alpha[r + i], s + i * kBlockKeys);
    }
    for (int64_t c = 0; c < padded; c += kColumns) {
      for (int64_t i = 0; i < rows; i += kRows) {
        const Range here = seen[i / kRows];
        if (here.begin >= here.end) continue;
        strided_product<Update::kScaleAdd, kBlockKeys, 1>(
            tile_rows(rows - i), here.end - here.begin, s + i * kBlockKeys + here.begin,
            v + c * kBlockKeys + here.begin * kColumns, state.o + (r + i) * padded + c, padded,
            state.alpha + r + i);
      }
    }
  }

  static int64_t tile_rows(int64_t left) {
    return left < Tile<Real>::kRows ? left : int64_t{Tile<Real>::kRows};
  }
};
