// The forward pass on the products of library_pack_body.h (no include guard: part of a body).
// Probabilities are rounded to bfloat16, their sum is not.

template <typename T>
struct LibraryProducts {
  static constexpr int64_t kStep = 8;       // few sizes: the library compiles a kernel for each
  static constexpr int64_t kPartRows = 32;  // of a group, where a block is visible in part
  static constexpr int64_t kStride = 2 * kBlockKeys;  // of probabilities, in place of the scores

  int64_t head_dim, padded;
  BFloat16* q;     // [rows, padded]
  BFloat16* k;     // panels of [padded / 2][kPanel][2]
  BFloat16* v;     // [kBlockKeys / 2][padded][2]
  float* s;        // [kGroupRows, kBlockKeys]: scores, then probabilities
  BFloat16* tile;  // [kPanel, padded]
  RowState<float> state;
  Product product;

  LibraryProducts(const AttentionParams& p, const AttentionPlan& plan, void* memory, size_t* bytes)
      : head_dim(p.head_dim), padded(library_padded(p.head_dim)), product(p.bfloat16_product) {
    Carver carver(memory);
    q = carver.take<BFloat16>(plan.block_rows * padded);
    k = carver.take<BFloat16>(kBlockKeys * padded);
    v = carver.take<BFloat16>(kBlockKeys * padded);
    s = carver.take<float>(kGroupRows * kBlockKeys);
    tile = carver.take<BFloat16>(kPanel * padded);
    state.carve(carver, plan.block_rows, padded);
    if (bytes) *bytes = carver.bytes();
  }

  void pack_queries(const AttentionParams& p, const Task& t, int64_t rows, float sign) const {
    for (int64_t i = 0; i < rows; ++i) {
      BFloat16* const row = q + i * padded;
      if (state.range[i].begin < state.range[i].end) {
        const RowIndex index(p, t, i);
        read_bfloat16(Tokens<T>(p.q, query_table(p, t.batch), head_dim, index.batch, index.head),
                      index.query, padded, row);
        if (sign != 1) {
          for (int64_t d = 0; d < head_dim; ++d) store(row + d, load(row[d]) * sign);
        }
      } else {
        __builtin_memset(row, 0, padded * sizeof(BFloat16));
      }
    }
  }

  void pack_keys(const Tokens<T>& keys, const Tokens<T>& values, int64_t first,
                 int64_t count) const {
    for (int64_t t = 0; t < count; t += kPanel) {
      read_panel(keys, first + t, count - t, padded, tile);
      pack_transposed_pairs(tile, padded, k + t * padded);
      read_panel(values, first + t, count - t, padded, tile);
      pack_pairs(tile, padded, v + t * padded);
    }
  }

  static int64_t block_keys(const AttentionTable&, int64_t) { return kBlockKeys; }
  float* output(int64_t r) const { return state.o + r * padded; }

  // Rows [r, r + rows), at most kGroupRows, against the packed keys: all together where each sees
  // the whole block, else in parts.
  void add_block(int64_t r, int64_t rows, Range keys, const Softmax<float>& softmax) const {
    bool whole = true;
    for (int64_t i = r; i < r + rows && whole; ++i) {
      whole = state.range[i].begin <= keys.begin && state.range[i].end >= keys.end;
    }
    const int64_t part = whole ? rows : kPartRows;
    for (int64_t i = 0; i < rows; i += part) {
      add_rows(r + i, rows - i < part ? rows - i : part, keys, softmax);
    }
  }

 private:
  void add_rows(int64_t r, int64_t rows, Range keys, const Softmax<float>& softmax) const {
    Range seen = group_range(state.range + r, rows, keys);
    if (seen.begin >= seen.end) return;
    seen = Range{seen.begin / kPanel * kPanel, round_up(seen.end, kPanel)};
    for (int64_t t = seen.begin; t < seen.end; t += kPanel) {
      product(rows, kPanel, padded, padded, kPanel, kBlockKeys, false, q + r * padded,
              k + t * padded, s + t);
    }
    BFloat16* const p = reinterpret_cast<BFloat16*>(s);
    for (int64_t i = 0; i < rows; ++i) {
      float& alpha = state.alpha[r + i];
      softmax(s + i * kBlockKeys, block_range(state.range[r + i], keys), seen, state.m[r + i],
              state.l[r + i], alpha, p + i * kStride);
      if (alpha == 1) continue;
      float* const o = state.o + (r + i) * padded;
      for (int64_t d = 0; d < padded; ++d) o[d] *= alpha;
    }
    product(rows, padded, seen.end - seen.begin, kStride, padded, padded, true, p + seen.begin,
            v + seen.begin * padded, state.o + r * padded);
  }
};
