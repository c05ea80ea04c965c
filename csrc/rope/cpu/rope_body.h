// The kernels of rope.h for one instruction set: see common/cpu/foreach_isa.h. Loops over pairs are
// plain and left to the compiler's vectoriser; only float16 needs instructions by name.
//
// One block of tokens of one row at a time: its table of cosines and sines first, then every head
// of q and k with it, along memory. Each input byte is read once and each output byte written once.

// y = rotation(x) of one token and head; x and y may be the same memory.
template <bool kInterleaved, typename X, typename Y, typename Value>
void rotate_pairs(const X* x, Y* y, const Value* cos, const Value* sin, int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t first = kInterleaved ? 2 * i : i;
    const int64_t second = kInterleaved ? 2 * i + 1 : i + pairs;
    const Value x1 = load(x[first]), x2 = load(x[second]);
    store(&y[first], x1 * cos[i] - x2 * sin[i]);
    store(&y[second], x2 * cos[i] + x1 * sin[i]);
  }
}

// As rotate_pairs; `row` is room for the 2 * pairs values of one row.
template <bool kInterleaved, typename T, typename Value>
void rotate_row(const T* x, T* y, const Value* cos, const Value* sin, int64_t pairs, Value*) {
  rotate_pairs<kInterleaved>(x, y, cos, sin, pairs);
}
template <bool kInterleaved>
void rotate_row(const Float16* x, Float16* y, const float* cos, const float* sin, int64_t pairs,
                float* row) {
  load_row(x, row, 2 * pairs);
  rotate_pairs<kInterleaved>(row, row, cos, sin, pairs);
  store_row(row, y, 2 * pairs);
}

// Calls visit(head, token) for the heads and the tokens [0, count), along memory.
template <typename Visit>
void for_heads_and_tokens(const RopeTensor& t, int64_t count, const Visit& visit) {
  if (t.head_stride < t.token_stride) {
    for (int64_t token = 0; token < count; ++token) {
      for (int64_t head = 0; head < t.heads; ++head) visit(head, token);
    }
  } else {
    for (int64_t head = 0; head < t.heads; ++head) {
      for (int64_t token = 0; token < count; ++token) visit(head, token);
    }
  }
}

template <typename T, bool kInterleaved>
void rotate_block(const RopeParams& p, const RopeTensor& in, const RopeTensor& out, int64_t row,
                  int64_t begin, int64_t count, const RopeScratch& scratch) {
  using Value = typename ValueOf<T>::type;
  const T* x0 = static_cast<const T*>(in.data) + row * in.batch_stride + begin * in.token_stride;
  T* y0 = static_cast<T*>(out.data) + row * out.batch_stride + begin * out.token_stride;
  const Value* cos = static_cast<const Value*>(scratch.cos);
  const Value* sin = static_cast<const Value*>(scratch.sin);
  Value* values = static_cast<Value*>(scratch.row);
  const int64_t pairs = p.pairs;
  const int64_t rest = p.head_dim - 2 * pairs;
  for_heads_and_tokens(in, count, [&](int64_t head, int64_t token) {
    const T* x = x0 + head * in.head_stride + token * in.token_stride;
    T* y = y0 + head * out.head_stride + token * out.token_stride;
    rotate_row<kInterleaved>(x, y, cos + token * pairs, sin + token * pairs, pairs, values);
    if (rest > 0 && x != y) __builtin_memcpy(y + 2 * pairs, x + 2 * pairs, rest * sizeof(T));
  });
}

inline double factor_of(const RopeParams& p, int64_t row) {
  return p.attention_factor_rows ? p.attention_factor_rows[row] : p.attention_factor;
}

// Whether all rows of the batch turn alike.
inline bool rows_share_table(const RopeParams& p) {
  const auto shared = [](const RopeFrequencies& f) {
    return f.inv_freq_stride == 0 && f.base_inv_freq_stride == 0 && !f.start_tokens_rows;
  };
  return shared(p.turn) && shared(p.undo) && p.positions_batch_stride == 0;
}

// Calls visit(row, block's first token, its tokens) for items [begin, end), with the table made. A
// block's rows follow one another, so that rows which turn alike share its table.
template <typename Value, typename Visit>
void for_items(const RopeParams& p, const RopeScratch& scratch, int64_t begin, int64_t end,
               bool with_factor, const Visit& visit) {
  const int64_t block_tokens = rope_block_tokens(p);
  const bool share = rows_share_table(p) && !(with_factor && p.attention_factor_rows);
  int64_t frequencies_row = -1, table_block = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / p.batch, row = item % p.batch;
    const int64_t first = block * block_tokens;
    const int64_t count = p.tokens - first < block_tokens ? p.tokens - first : block_tokens;
    if (!(share && block == table_block)) {
      if (!(rows_share_table(p) ? frequencies_row >= 0 : frequencies_row == row)) {
        row_frequencies(p, row, scratch.frequencies);
        frequencies_row = row;
      }
      const Value factor = static_cast<Value>(with_factor ? factor_of(p, row) : 1.0);
      fill_table(p, row, first, first + count, factor, scratch.frequencies,
                 static_cast<Value*>(scratch.cos), static_cast<Value*>(scratch.sin));
      table_block = block;
    }
    visit(row, block, first, count);
  }
}

template <typename T, bool kInterleaved>
void rope_typed(const RopeParams& p, const RopeScratch& scratch, int64_t begin, int64_t end) {
  const auto visit = [&](int64_t row, int64_t, int64_t first, int64_t count) {
    rotate_block<T, kInterleaved>(p, p.q, p.q_out, row, first, count, scratch);
    rotate_block<T, kInterleaved>(p, p.k, p.k_out, row, first, count, scratch);
  };
  for_items<typename ValueOf<T>::type>(p, scratch, begin, end, true, visit);
}

// Calls visit with a zero of the element type.
template <typename Visit>
void for_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kFloat64:
      return visit(double{});
  }
}

inline void rope(const RopeParams& p, const RopeScratch& scratch, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.interleaved) {
      rope_typed<T, true>(p, scratch, begin, end);
    } else {
      rope_typed<T, false>(p, scratch, begin, end);
    }
  });
}
