// The forward pass in bfloat16 on the products of the caller's library, which knows the processor's
// matrix instructions (no include guard: part of a body). Q and P lie in rows, K and V in pairs of
// rows, [rows / 2][columns][2], as those instructions read them. Probabilities are rounded to
// bfloat16, their sum is not.

template <typename T>
struct LibraryProducts {
  static constexpr int64_t kStep = 8;       // few sizes: the library compiles a kernel for each
  static constexpr int64_t kPanel = 64;     // keys per panel
  static constexpr int64_t kPartRows = 32;  // of a group, where a block is visible in part
  static constexpr int64_t kStride = 2 * kBlockKeys;  // of probabilities, in place of the scores

  int64_t head_dim, padded;
  BFloat16* q;     // [rows, padded]
  BFloat16* k;     // panels of [padded / 2][kPanel][2]
  BFloat16* v;     // [kBlockKeys / 2][padded][2]
  float* s;        // [kGroupRows, kBlockKeys]: scores, then probabilities
  BFloat16* tile;  // [kPanel, padded]
  RowState<float> state;
  BFloat16Product product;

  LibraryProducts(const AttentionParams& p, const AttentionPlan& plan, void* memory, size_t* bytes)
      : head_dim(p.head_dim),
        padded(round_up(p.head_dim, 32)),  // whole steps of the instructions
        product(p.bfloat16_product) {
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
        read(Tokens<T>(p.q, p.rotate_q, head_dim, index.batch, index.head), index.query, row);
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
      read_panel(keys, first + t, count - t);
      // Pairs of bfloat16 move as one float.
      transpose(reinterpret_cast<const float*>(tile), padded / 2, kPanel, padded / 2,
                reinterpret_cast<float*>(k + t * padded), kPanel);
      read_panel(values, first + t, count - t);
      for (int64_t i = 0; i < kPanel; i += 2) {
        const BFloat16* const row = tile + i * padded;
        BFloat16* const pairs = v + (t + i) * padded;
        for (int64_t d = 0; d < padded; ++d) {
          pairs[2 * d] = row[d];
          pairs[2 * d + 1] = row[padded + d];
        }
      }
    }
  }

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

  void read(const Tokens<T>& x, int64_t token, BFloat16* row) const {
    if (x.cos) {
      float values[kMaxHeadDim];
      x.read(token, values);
      write_row(values, row, head_dim);
    } else {
      __builtin_memcpy(row, x.data + token * x.token_stride, head_dim * sizeof(BFloat16));
    }
    for (int64_t d = head_dim; d < padded; ++d) row[d].bits = 0;
  }

  // Up to kPanel of `left` tokens, and zeros.
  void read_panel(const Tokens<T>& x, int64_t first, int64_t left) const {
    const int64_t here = left < kPanel ? left : kPanel;
    for (int64_t i = 0; i < here; ++i) read(x, first + i, tile + i * padded);
    __builtin_memset(tile + here * padded, 0, (kPanel - here) * padded * sizeof(BFloat16));
  }
};
