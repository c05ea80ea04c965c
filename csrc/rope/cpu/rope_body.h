// The kernels of rope.h for one instruction set: see common/cpu/foreach_isa.h.
//
// One block of tokens of one row at a time: its tables of cosines and sines first, one for each
// group of heads, then every head of q and k with its group's, along memory. Each input byte is
// read once and each output byte written once.

// Calls visit(head, token, ahead) for the heads and the tokens [0, count), along memory. `ahead` is
// the offset of a row to come, also where the next head begins, which the processor's own
// prefetchers do not foresee.
template <typename Visit>
inline __attribute__((always_inline)) void for_heads_and_tokens(const RopeTensor& t, int64_t count,
                                                                int64_t row_bytes,
                                                                const Visit& visit) {
  // Into the second-level cache. In place, 8 heads of 16384 tokens on one core of Zen 3: 8 rows
  // ahead into the first level took 1.2 times as long in float32, 4 to 16 KiB ahead the same.
  constexpr int64_t kAheadBytes = 8192;
  const bool token_major = t.head_stride < t.token_stride;
  const int64_t outer_count = token_major ? count : t.heads;
  const int64_t inner_count = token_major ? t.heads : count;
  const int64_t outer_stride = token_major ? t.token_stride : t.head_stride;
  const int64_t inner_stride = token_major ? t.head_stride : t.token_stride;
  if (outer_count == 0 || inner_count == 0 || row_bytes == 0) return;
  const int64_t rows_ahead = ceil_div(kAheadBytes, row_bytes);
  const int64_t outer_ahead = rows_ahead / inner_count, inner_ahead = rows_ahead % inner_count;
  for (int64_t outer = 0; outer < outer_count; ++outer) {
    for (int64_t inner = 0; inner < inner_count; ++inner) {
      int64_t to_outer = outer + outer_ahead, to_inner = inner + inner_ahead;
      if (to_inner >= inner_count) to_inner -= inner_count, ++to_outer;
      if (to_outer >= outer_count) to_outer = outer_count - 1;
      visit(token_major ? inner : outer, token_major ? outer : inner,
            to_outer * outer_stride + to_inner * inner_stride);
    }
  }
}

// Whether all rows of the batch turn by the same frequencies.
inline bool rows_share_frequencies(const RopeParams& p) {
  const auto shared = [](const RopeFrequencies& f) {
    return f.inv_freq_stride == 0 && f.base_inv_freq_stride == 0 && !f.start_tokens_rows &&
           !f.tier_rows;
  };
  return shared(p.turn) && shared(p.undo);
}

// The memory of one thread.
template <typename T>
class RopeScratch {
 public:
  using Real = RealOf<T>;
  static constexpr bool kSpaced = sizeof(T) == 2;
  Real *cos, *sin;        // [groups, block tokens, pairs]
  Real* row;              // [2 * pairs]
  T* turned;              // [head_dim], on a cache line
  uint64_t* frequencies;  // [groups, 4, pairs]
  SpacedRuns* spaced;     // elements of 16 bits: [groups]
  Real *cross, *dot;      // gradients: [groups, block tokens, pairs], A and B of rope.h

  RopeScratch(const RopeParams& p, bool gradients) : memory_(carve(nullptr, p, gradients)) {
    carve(memory_, p, gradients);
    const int64_t tokens = p.tokens * (rows_share_frequencies(p) ? p.batch : 1);
    for (int64_t group = 0; kSpaced && group < p.groups; ++group) {
      float* const memory = turns_ + group * SpacedRuns::floats(p.pairs);
      spaced[group] = SpacedRuns(memory, p.pairs, tokens);
    }
  }

 private:
  int64_t carve(void* memory, const RopeParams& p, bool gradients) {
    const int64_t table = p.groups * rope_block_tokens(p) * p.pairs;
    Carver carver(memory);
    cos = carver.take<Real>(table);
    sin = carver.take<Real>(table);
    row = carver.take<Real>(2 * p.pairs);
    turned = carver.take<T>(p.head_dim);
    frequencies = carver.take<uint64_t>(p.groups * 4 * p.pairs);
    spaced = carver.take<SpacedRuns>(kSpaced ? p.groups : 0);
    turns_ = carver.take<float>(kSpaced ? p.groups * SpacedRuns::floats(p.pairs) : 0);
    cross = carver.take<Real>(gradients ? table : 0);
    dot = carver.take<Real>(gradients ? table : 0);
    return carver.bytes();
  }

  float* turns_;
  Buffer<char> memory_;
};

// Where in the tables of a block of `count` tokens a token of a head of `t` has its values.
class TableRows {
 public:
  TableRows(const RopeParams& p, const RopeTensor& t, int64_t count)
      : count_(p.groups > 1 ? count : 0),
        scale_(t.heads > 0 ? (kOne * p.groups + t.heads - 1) / t.heads : 0) {}

  int64_t operator()(int64_t head, int64_t token) const {
    return static_cast<int64_t>(head * scale_ / kOne) * count_ + token;
  }

 private:
  // head / (heads / groups) by a product, exact for heads below 2^16: a division for every row took
  // a fifth of the time of turning it.
  static constexpr uint64_t kOne = uint64_t{1} << 32;
  int64_t count_;
  uint64_t scale_;
};

template <bool kInterleaved, typename T>
void rotate_block(const RopeParams& p, const RopeTensor& in, const RopeTensor& out, int64_t row,
                  int64_t begin, int64_t count, const RopeScratch<T>& scratch) {
  const T* x0 = static_cast<const T*>(in.data) + row * in.batch_stride + begin * in.token_stride;
  T* y0 = static_cast<T*>(out.data) + row * out.batch_stride + begin * out.token_stride;
  const RealOf<T>*const cos = scratch.cos, *const sin = scratch.sin;
  const TableRows table_row(p, in, count);
  const int64_t pairs = p.pairs;
  const int64_t rest = p.head_dim - 2 * pairs;
  const int64_t bytes = p.head_dim * sizeof(T);
  const bool streamed = rope_streams(p, in, out, sizeof(T));
  // Copies, since rows of any type could be where the parameters are.
  const int64_t in_head = in.head_stride, in_token = in.token_stride;
  const int64_t out_head = out.head_stride, out_token = out.token_stride;
  for_heads_and_tokens(
      in, count, bytes,
      [&](int64_t head, int64_t token, int64_t ahead) __attribute__((always_inline)) {
        fetch_row(x0 + ahead, bytes);
        const T* x = x0 + head * in_head + token * in_token;
        T* const result = y0 + head * out_head + token * out_token;
        const int64_t at = table_row(head, token) * pairs;
        if constexpr (std::is_same_v<T, BFloat16>) {
          if (streamed && rest == 0 && pairs % 32 == 0) {
            rotate_row<kInterleaved, true>(x, result, cos + at, sin + at, pairs, scratch.row);
            return;
          }
        }
        T* y = streamed ? scratch.turned : result;
        rotate_row<kInterleaved>(x, y, cos + at, sin + at, pairs, scratch.row);
        if (rest > 0 && x != y) __builtin_memcpy(y + 2 * pairs, x + 2 * pairs, rest * sizeof(T));
        if (streamed) stream_row(y, result, bytes);
      });
}

// Calls visit(row, block's first token, its tokens) for items [begin, end), with the tables made. A
// block's rows follow one another where they share frequencies, so that they share its tables too
// where their positions are the same; else a row's blocks do, whose frequencies are made once.
//
// slot(pairs, i) is where pair i stands in a table.
template <typename T, typename Slot, typename Visit>
void for_items(const RopeParams& p, const RopeScratch<T>& scratch, int64_t begin, int64_t end,
               bool with_factor, const Slot& slot, const Visit& visit) {
  const int64_t block_tokens = rope_block_tokens(p);
  const bool alike = rows_share_frequencies(p);
  const bool share =
      alike && p.positions_batch_stride == 0 && !(with_factor && p.attention_factor_rows);
  const int64_t blocks = ceil_div(p.tokens, block_tokens);
  int64_t frequencies_row = -1, table_block = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = alike ? item / p.batch : item % blocks;
    const int64_t row = alike ? item % p.batch : item / blocks;
    const RowTiers tiers = tiers_of(p, row);
    if (stays(p, tiers)) continue;
    const int64_t first = block * block_tokens;
    const int64_t count = p.tokens - first < block_tokens ? p.tokens - first : block_tokens;
    if (!(share && block == table_block)) {
      const bool known = alike ? frequencies_row >= 0 : frequencies_row == row;
      for (int64_t group = 0; group < p.groups; ++group) {
        const RopeParams& part = p.groups == 1 ? p : group_of(p, group);
        uint64_t* const frequencies = scratch.frequencies + group * 4 * p.pairs;
        if (!known) row_frequencies(part, row, slot, frequencies);
        if constexpr (RopeScratch<T>::kSpaced) {
          if (!known) scratch.spaced[group].forget();
        }
        const RealOf<T> factor = with_factor ? factor_of(part, row, tiers) : 1.0;
        const int64_t at = group * count * p.pairs;
        for_runs(part, row, first, first + count, frequencies,
                 [&](uint64_t position, int64_t tokens, const uint64_t* turns, int64_t token) {
                   RealOf<T>* const cos = scratch.cos + at + token * p.pairs;
                   RealOf<T>* const sin = scratch.sin + at + token * p.pairs;
                   if constexpr (RopeScratch<T>::kSpaced) {
                     scratch.spaced[group].fill(position, tokens, factor, turns, cos, sin);
                   } else {
                     fill_run(position, tokens, p.pairs, factor, turns, cos, sin);
                   }
                 });
      }
      frequencies_row = row;
      table_block = block;
    }
    visit(row, block, first, count);
  }
}

// Calls visit with a zero of the element type and, as a type, whether pairs are interleaved.
template <typename Visit>
void for_layout(const RopeParams& p, const Visit& visit) {
  for_dtype(p.dtype, [&](auto zero) {
    p.interleaved ? visit(zero, std::true_type()) : visit(zero, std::false_type());
  });
}

inline void rope(const RopeParams& p, int64_t begin, int64_t end) {
  for_layout(p, [&](auto zero, auto interleaved) {
    using T = decltype(zero);
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const RopeScratch<T> scratch(p, false);
    for_items(p, scratch, begin, end, true, table_slot<T, kInterleaved>,
              [&](int64_t row, int64_t, int64_t first, int64_t count) {
                rotate_block<kInterleaved>(p, p.q, p.q_out, row, first, count, scratch);
                rotate_block<kInterleaved>(p, p.k, p.k_out, row, first, count, scratch);
              });
  });
}

inline void rope_table(const RopeParams& p, int64_t begin, int64_t end, void* cos, void* sin) {
  const Buffer<uint64_t> frequencies(4 * p.pairs);
  row_frequencies(p, 0, table_slot<float, false>, frequencies);
  const double factor = factor_of(p, 0, tiers_of(p, 0));
  for_dtype(p.dtype, [&](auto zero) {
    using Real = RealOf<decltype(zero)>;
    for_runs(p, 0, begin, end, frequencies,
             [&](uint64_t position, int64_t tokens, const uint64_t* turns, int64_t token) {
               const int64_t at = token * p.pairs;
               fill_run(position, tokens, p.pairs, static_cast<Real>(factor), turns,
                        static_cast<Real*>(cos) + at, static_cast<Real*>(sin) + at);
             });
  });
}
