// The backward pass on the products of library_pack_body.h (no include guard: part of a body).
// dK and dV gather transposed, so that P and dS, which are made by rows, are the B of their
// products and what is transposed is Q and dO:  dV^T += dO^T P,  dK^T += Q^T dS.

template <typename T>
struct LibraryGradProducts {
  static constexpr int64_t kStep = 32;                // the product's step along the sum over rows
  static constexpr int64_t kStride = 2 * kBlockKeys;  // of dS in bfloat16, in place of the scores

  int64_t head_dim, padded;
  BFloat16 *q, *dout;            // [kGradRows, padded]
  BFloat16 *q_t, *do_t;          // [padded, kGradRows]
  BFloat16 *k, *v;               // panels of [padded / 2][kPanel][2]
  BFloat16* k_pairs;             // [kBlockKeys / 2][padded][2]
  float *s, *ds;                 // [kGradRows, kBlockKeys]
  BFloat16 *p_pairs, *ds_pairs;  // panels of [kGradRows / 2][kPanel][2]
  float *dk_t, *dv_t;            // [padded, kBlockKeys]
  float *dk, *dv;                // [kBlockKeys, padded]
  BFloat16* tile;                // [kPanel, padded]
  float* pairs;                  // [padded / 2, kGradRows] pairs of bfloat16
  float* row;                    // [2, padded]
  Range* range;                  // [kGradRows] visible keys
  Product product;

  LibraryGradProducts(const AttentionParams& p, void* memory, size_t* bytes)
      : head_dim(p.head_dim), padded(library_padded(p.head_dim)), product(p.bfloat16_product) {
    Carver carve(memory);
    for (auto** x : {&q, &dout, &q_t, &do_t}) *x = carve.take<BFloat16>(kGradRows * padded);
    for (auto** x : {&k, &v, &k_pairs}) *x = carve.take<BFloat16>(kBlockKeys * padded);
    for (auto** x : {&s, &ds}) *x = carve.take<float>(kGradRows * kBlockKeys);
    for (auto** x : {&p_pairs, &ds_pairs}) *x = carve.take<BFloat16>(kGradRows * kBlockKeys);
    for (auto** x : {&dk_t, &dv_t, &dk, &dv}) *x = carve.take<float>(kBlockKeys * padded);
    tile = carve.take<BFloat16>(kPanel * padded);
    pairs = carve.take<float>(kGradRows * padded / 2);
    row = carve.take<float>(2 * padded);
    range = carve.take<Range>(kGradRows);
    if (bytes) *bytes = carve.bytes();
  }

  void pack_keys(const Tokens<T>& keys, const Tokens<T>& values, int64_t first,
                 int64_t count) const {
    for (int64_t t = 0; t < count; t += kPanel) {
      read_panel(keys, first + t, count - t, padded, tile);
      pack_transposed_pairs(tile, padded, k + t * padded);
      pack_pairs(tile, padded, k_pairs + t * padded);
      read_panel(values, first + t, count - t, padded, tile);
      pack_transposed_pairs(tile, padded, v + t * padded);
    }
    for (int64_t i = 0; i < kBlockKeys * padded; ++i) dk_t[i] = dv_t[i] = 0;
  }

  void pack_rows(const AttentionBackwardParams& g, const Task& t, int64_t rows) const {
    pack(g.forward, g.forward.q, t, rows, q, q_t);
    pack(g.forward, g.grad_out, t, rows, dout, do_t);
  }

  // The five products for a block of rows and a block of keys. dq: [rows, padded].
  void add_block(int64_t rows, Range keys, const SoftmaxGrad<float>& softmax, const float* lse,
                 const float* delta, float* dq) const {
    Range seen = group_range(range, rows, keys);
    seen = Range{seen.begin / kPanel * kPanel, round_up(seen.end, kPanel)};
    for (int64_t t = seen.begin; t < seen.end; t += kPanel) {
      product(rows, kPanel, padded, padded, kPanel, kBlockKeys, false, q, k + t * padded, s + t);
      product(rows, kPanel, padded, padded, kPanel, kBlockKeys, false, dout, v + t * padded,
              ds + t);
    }
    for (int64_t i = 0; i < rows; ++i) {
      softmax(s + i * kBlockKeys, ds + i * kBlockKeys, block_range(range[i], keys), seen, lse[i],
              delta[i]);
    }
    for (int64_t i = 0; i < rows; i += 2) narrow_rows(i, seen);
    product(rows, padded, seen.end - seen.begin, kStride, padded, padded, true,
            reinterpret_cast<const BFloat16*>(ds) + seen.begin, k_pairs + seen.begin * padded, dq);
    for (int64_t t = seen.begin; t < seen.end; t += kPanel) {
      product(padded, kPanel, rows, kGradRows, kPanel, kBlockKeys, true, do_t,
              p_pairs + t * kGradRows, dv_t + t);
      product(padded, kPanel, rows, kGradRows, kPanel, kBlockKeys, true, q_t,
              ds_pairs + t * kGradRows, dk_t + t);
    }
  }

  void finish_keys() const {
    transpose(dk_t, kBlockKeys, padded, kBlockKeys, dk, padded);
    transpose(dv_t, kBlockKeys, padded, kBlockKeys, dv, padded);
  }

 private:
  void pack(const AttentionParams& p, const AttentionTensor& x, const Task& t, int64_t rows,
            BFloat16* packed, BFloat16* transposed) const {
    for (int64_t i = 0; i < rows; ++i) {
      BFloat16* const to = packed + i * padded;
      if (range[i].begin < range[i].end) {
        const RowIndex index(p, t, i);
        read_bfloat16(Tokens<T>(x, AttentionTable{}, head_dim, index.batch, index.head),
                      index.query, padded, to);
      } else {
        __builtin_memset(to, 0, padded * sizeof(BFloat16));
      }
    }
    transpose(reinterpret_cast<const float*>(packed), padded / 2, rows, padded / 2, pairs,
              kGradRows);
    for (int64_t d = 0; d < padded / 2; ++d) {
      const BFloat16* const from = reinterpret_cast<const BFloat16*>(pairs + d * kGradRows);
      BFloat16* const to = transposed + 2 * d * kGradRows;
      for (int64_t i = 0; i < rows; ++i) {
        to[i] = from[2 * i];
        to[kGradRows + i] = from[2 * i + 1];
      }
    }
  }

  // Rows i and i + 1 of P and dS to pairs in bfloat16, and of dS also to rows.
  void narrow_rows(int64_t i, Range seen) const {
    constexpr int64_t kLanes = Vector<float>::kLanes;
    for (int64_t j = seen.begin; j < seen.end; j += kLanes) {
      const int64_t at = j / kPanel * kPanel * kGradRows + i * kPanel + j % kPanel * 2;
      const float* const p = s + i * kBlockKeys + j;
      store_pairs(p_pairs + at, load_vector(p), load_vector(p + kBlockKeys));
      const float* const x = ds + i * kBlockKeys + j;
      const VectorOf<float> first = load_vector(x), second = load_vector(x + kBlockKeys);
      store_pairs(ds_pairs + at, first, second);
      BFloat16* const rows = reinterpret_cast<BFloat16*>(ds) + i * kStride + j;
      store_vector(rows, first);
      store_vector(rows + kStride, second);
    }
  }
};
