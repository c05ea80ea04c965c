// The gradients of RopeBackwardParams for one instruction set (no include guard: part of a body).

// Adds A and B of one token and head.
template <bool kInterleaved, typename T, typename Value>
void add_products(const T* x, const T* g, Value* cross, Value* dot, int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t first = kInterleaved ? 2 * i : i;
    const int64_t second = kInterleaved ? 2 * i + 1 : i + pairs;
    const Value x1 = load(x[first]), x2 = load(x[second]);
    const Value g1 = load(g[first]), g2 = load(g[second]);
    cross[i] += x1 * g2 - x2 * g1;
    dot[i] += x1 * g1 + x2 * g2;
  }
}

template <bool kInterleaved, typename T>
void add_block(const RopeParams& p, const RopeTensor& in, const RopeTensor& grad, int64_t row,
               int64_t begin, int64_t count, const RopeScratch<T>& scratch) {
  const T* x0 = static_cast<const T*>(in.data) + row * in.batch_stride + begin * in.token_stride;
  const T* g0 =
      static_cast<const T*>(grad.data) + row * grad.batch_stride + begin * grad.token_stride;
  const TableRows table_row(p, in, count);
  for_heads_and_tokens(
      in, count, p.head_dim * sizeof(T), [&](int64_t head, int64_t token, int64_t) {
        const int64_t at = table_row(head, token) * p.pairs;
        add_products<kInterleaved>(x0 + head * in.head_stride + token * in.token_stride,
                                   g0 + head * grad.head_stride + token * grad.token_stride,
                                   scratch.cross + at, scratch.dot + at, p.pairs);
      });
}

// Of the tokens of one block and one group, the share `p`, whose A and B are complete: sums
// [2 * pairs + 1].
template <typename T>
void add_tokens(const RopeParams& p, int64_t row, int64_t group, int64_t first, int64_t count,
                const RopeScratch<T>& scratch, double* sums) {
  const bool forward = p.turn.inv_freq;
  const RopeFrequencies& used = forward ? p.turn : p.undo;
  const RowTiers tiers = tiers_of(p, row);
  const int64_t start = start_tokens_of(used, row, forward ? tiers.turn : tiers.undo);
  const double factor = forward ? factor_of(p, row, tiers) : -factor_of(p, row, tiers);
  double factor_sum = 0;
  for (int64_t token = 0; token < count; ++token) {
    const int64_t position = position_of(p, row, first + token);
    const int64_t at = (group * count + token) * p.pairs;
    double* to = sums + (is_below(start, position) ? p.pairs : 0);
    const double scale = factor * static_cast<double>(position);
    for (int64_t i = 0; i < p.pairs; ++i) {
      const double a = scratch.cross[at + i], b = scratch.dot[at + i];
      const double c = scratch.cos[at + i], s = scratch.sin[at + i];
      to[i] += scale * (a * c - b * s);
      factor_sum += b * c + a * s;
    }
  }
  sums[2 * p.pairs] = factor_sum;
}

inline void rope_backward(const RopeBackwardParams& params, int64_t begin, int64_t end) {
  const RopeParams& p = params.forward;
  const int64_t width = 2 * p.pairs + 1, blocks = ceil_div(p.tokens, rope_block_tokens(p));
  for_layout(p, [&](auto zero, auto interleaved) {
    using T = decltype(zero);
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const RopeScratch<T> scratch(p, true);
    for_items(p, scratch, begin, end, false, table_slot<RealOf<T>, kInterleaved>,
              [&](int64_t row, int64_t block, int64_t first, int64_t count) {
                for (RealOf<T>* x : {scratch.cross, scratch.dot}) {
                  std::memset(x, 0, p.groups * count * p.pairs * sizeof(*x));
                }
                add_block<kInterleaved>(p, p.q, params.grad_q, row, first, count, scratch);
                add_block<kInterleaved>(p, p.k, params.grad_k, row, first, count, scratch);
                for (int64_t group = 0; group < p.groups; ++group) {
                  const int64_t place = (group * p.batch + row) * blocks + block;
                  double* const sums = params.partial + place * width;
                  std::memset(sums, 0, width * sizeof(double));
                  add_tokens(group_of(p, group), row, group, first, count, scratch, sums);
                }
              });
  });
}
